"""From a path to a clip, decoded once."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vrlt_fast.config import VideoConfig
from vrlt_fast.video.decode import Decoder, decode_frames
from vrlt_fast.video.index import VideoIndex, video_error
from vrlt_fast.video.index_cache import IndexCache
from vrlt_fast.video.preprocess import Clip, Geometry, SizeRule, patchify, resize
from vrlt_fast.video.sampling import TUBELET, SampleSettings, choose, settings_of
from vrlt_fast.video.share import Cuts, decoding_cuts
from vrlt_fast.video.store.entry import Run
from vrlt_fast.video.store.eviction import hint
from vrlt_fast.video.store.frame_cache import CacheSettings, Decoded, FrameCache, run_of

Decode = Callable[[VideoIndex, Sequence[int], tuple[int, int], Geometry], Decoded]
"""From an index, frame numbers, height and width, and the tower's geometry to patches. Raises VideoError."""
Pixels = Callable[[VideoIndex], str]
"""Names what a ``Decode`` makes of a file's frames (colours, resampling): equal names, equal patches."""

_REQUESTS = 256
HORIZON = 16384
"""Uses ahead that eviction knows of."""
INEXACT = "-inexact"
"""End of the key of a clip whose patches may differ from those of another clip of this key."""


class _Changed(Exception):
    """The file isn't the one that was hashed any more."""


@dataclass(frozen=True)
class Request:
    """What a clip will be, known without decoding: its run and times. ``content``: digest of the file's bytes. Of one
    that processes share, ``run`` and ``frames`` are this process's, ``name`` and ``pairs`` the whole clip's.
    """

    path: Path
    content: str
    run: Run
    frames: tuple[int, ...]
    size: tuple[int, int]
    times: tuple[float, ...]
    seconds_per_grid: float
    name: str
    pairs: int
    cuts: Cuts


def decode_plainly(index: VideoIndex, frames: Sequence[int], size: tuple[int, int], geometry: Geometry) -> Decoded:
    """Decode in this process, resize by torch's native kernel."""
    pictures = decode_frames(index, frames)
    if pictures.shape[1:3] != upright(index):
        told = "{1} x {0}".format(*upright(index))
        why = f"frames are {pictures.shape[2]} x {pictures.shape[1]}, the header says {told}"
        raise video_error("VRLT-V06", index.path, "the frame size isn't the header's", why)
    return Decoded(patchify(resize(pictures, *size), geometry)[0])


def plain_pixels(index: VideoIndex) -> str:
    """What :func:`decode_plainly` makes of frames; FFmpeg's conversion to RGB may change from version to version."""
    import av

    version = ".".join(str(part) for part in av.library_versions["libswscale"])
    return f"swscale {version} {index.matrix} {index.full_range} torch-u8-bicubic"


def decoding(decoder: Decoder) -> tuple[Decode, Pixels]:
    """``decode`` and ``pixels`` of a :class:`ClipLoader` that decodes with this."""

    def pixels(name: str, index: VideoIndex) -> str:
        return plain_pixels(index) if name == "pyav" else f"{name} {index.matrix} {index.full_range}"

    def decode(index: VideoIndex, frames: Sequence[int], size: tuple[int, int], geometry: Geometry) -> Decoded:
        expected = decoder.takes(index)
        patches, _, report = decoder.patches(index, frames, size, geometry)
        # a decoder that another one had to stand in for may have other colours than the key says
        exact = not report.substituted and pixels(report.backend, index) == pixels(expected, index)
        return Decoded(patches, exact)

    return decode, lambda index: pixels(decoder.takes(index), index)


def upright(index: VideoIndex) -> tuple[int, int]:
    """Height and width of the pictures as they are shown."""
    return (index.width, index.height) if index.rotation % 180 else (index.height, index.width)


class ClipLoader:
    """Loads clips with one video configuration. Safe to use from several threads.

    Counters: ``decoded`` (clips of which anything was decoded) and ``hits`` (clips of which nothing was).

    Args:
        cache: None: host memory of this process, ``video.cache_gb`` GB.
        decode, pixels: how a clip's missing tubelets are decoded; see :func:`decoding`.
        settings, rule: how frames are chosen and resized; None: as ``video`` says.
        index: indexes and hashes files; None: without a folder.
        part: rank and number of processes that share each clip.
    """

    def __init__(
        self,
        video: VideoConfig,
        geometry: Geometry,
        *,
        cache: FrameCache | None = None,
        decode: Decode = decode_plainly,
        pixels: Pixels = plain_pixels,
        settings: SampleSettings | None = None,
        rule: SizeRule | None = None,
        index: IndexCache | None = None,
        part: tuple[int, int] = (0, 1),
    ):
        self._part = part
        self.video, self.geometry = video, geometry
        self.decoded = self.hits = 0
        self.cache = cache or FrameCache(CacheSettings(host_bytes=int(video.cache_gb * 1e9)))
        self._settings = settings or settings_of(video)
        self._rule = rule or SizeRule("qwen2", video.min_pixels, video.max_pixels)
        self._decode, self._pixels, self._index = decode, pixels, index or IndexCache()
        self._lock = threading.Lock()
        self._busy: dict[str, tuple[threading.Lock, int]] = {}
        self._known: set[str] = set()
        self._requests: OrderedDict[tuple[str, str], Request] = OrderedDict()
        self._clips: weakref.WeakValueDictionary[str, Clip] = weakref.WeakValueDictionary()

    def expect(self, order: Iterable[Path]) -> None:
        """The files that will be loaded next, in order, perhaps endless: what eviction goes by."""
        self.cache.expect(itertools.islice(order, HORIZON))

    def load(self, path: Path) -> Clip:
        """The clip of a file. Raises VideoError (V01-V06)."""
        for _ in range(2):
            with contextlib.suppress(_Changed):
                request = self._request(path)
                with self._alone(request.run.name):
                    return self._load(request)
        raise video_error("VRLT-V02", path, "the file changes while it is read", fix="wait until it is written")

    def prepare(self, path: Path) -> Request:
        """What :meth:`load` will give, without decoding. Raises VideoError (V01-V06)."""
        for _ in range(2):
            with contextlib.suppress(_Changed):
                return self._request(path)
        raise video_error("VRLT-V02", path, "the file changes while it is read", fix="wait until it is written")

    def _load(self, request: Request) -> Clip:
        run, own = request.run, f"{request.name} {request.cuts}"
        clip = self._clips.get(own)
        if clip is not None:
            self.cache.horizon.used(hint(request.path), run.nbytes)
            with self._lock:
                self.hits += 1
            return clip
        if not run.ticks:
            nothing = torch.empty(run.shape, dtype=torch.uint8)
            return self._clip(request, nothing, request.name)
        fetched = self.cache.fetch(run, hint(request.path), lambda slots: self._decode_slots(request, slots))
        with self._lock:
            self.decoded += fetched.fresh > 0
            self.hits += fetched.fresh == 0
        # equal keys, equal patches
        clip = self._clip(request, fetched.patches, request.name if fetched.exact else request.name + INEXACT)
        if fetched.exact:
            self._clips[own] = clip
        return clip

    def _clip(self, request: Request, patches: torch.Tensor, key: str) -> Clip:
        grid = (request.pairs, request.run.height, request.run.width)
        times, each = request.times, request.seconds_per_grid
        return Clip(patches, grid, times, each, key, self.geometry, cuts=request.cuts)

    def _decode_slots(self, request: Request, slots: Sequence[int]) -> Decoded:
        index = self._index.probe(request.path)
        numbers = [TUBELET * slot + i for slot in slots for i in range(TUBELET)]
        frames = [request.frames[number] for number in numbers]
        ticks = [request.run.ticks[number // TUBELET][number % TUBELET] for number in numbers]
        if max(frames) >= index.n_frames or index.ticks[frames].tolist() != ticks:
            raise _Changed
        decoded = self._decode(index, frames, request.size, self.geometry)
        if self._index.content_hash(request.path) != request.content:
            raise _Changed
        return decoded

    def _request(self, path: Path) -> Request:
        before = _identity(path)
        with self._lock:
            known = str(path) in self._known
        index = None if known else self._index.probe(path)  # before hashing: it refuses what would take long to read
        content = self._index.content_hash(path)
        with self._lock:
            request = self._requests.get((str(path), content))
            if request is not None:
                self._requests.move_to_end((str(path), content))
                return request
        request = self._new_request(index or self._index.probe(path), content)
        if _identity(path) != before:
            raise _Changed
        with self._lock:
            self._known.add(str(path))
            self._requests[str(path), content] = request
            if len(self._requests) > _REQUESTS:
                self._requests.popitem(last=False)
        return request

    def _new_request(self, index: VideoIndex, content: str) -> Request:
        path = index.path
        choice = choose(index, self._settings)
        beyond = [i for i in choice.frames if not 0 <= i < index.n_frames]
        if beyond:
            raise video_error("VRLT-V05", path, f"frame {beyond[0]} asked for, the file has {index.n_frames}")
        try:
            size = self._rule.size(choice.sampled, *upright(index), self.geometry.factor)
        except ValueError as error:
            fix = "crop the video, or remove its lines"
            raise video_error("VRLT-V06", path, "frames can't be resized", str(error), fix) from None
        run = run_of(content, index, choice.frames, size, self.geometry, pixels=self._pixels(index))
        (rank, processes), frames, name, pairs = self._part, choice.frames, run.name, len(run.ticks)
        cuts = decoding_cuts(index, frames, processes) if processes > 1 else ()
        if cuts:
            low, high = cuts[rank : rank + 2]
            run, frames = run.part(range(low, high)), frames[TUBELET * low : TUBELET * high]
        return Request(path, content, run, frames, size, choice.times, choice.seconds_per_grid, name, pairs, cuts)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One thread a clip."""
        with self._lock:
            lock, users = self._busy.get(name, (threading.Lock(), 0))
            self._busy[name] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._busy.pop(name)
                if users > 1:
                    self._busy[name] = lock, users - 1


def _identity(path: Path) -> tuple[int, ...]:
    """What changes with a file's content; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
