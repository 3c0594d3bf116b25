"""The cells of the case ``video_gpu``: each returns its records, or raises where it can't run here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F

from bench import measure
from bench.harness import Record, summarize
from bench.providers import Arm
from bench.video_files import Clip, make
from vrlt_fast.config import VideoConfig
from vrlt_fast.video.backends import nvdec
from vrlt_fast.video.backends.base import Backend
from vrlt_fast.video.backends.dali import DaliBackend
from vrlt_fast.video.backends.pyav import PyAVBackend
from vrlt_fast.video.backends.torchcodec import TorchcodecBackend
from vrlt_fast.video.cache import ClipLoader
from vrlt_fast.video.decode import Decoder
from vrlt_fast.video.index import VideoIndex, probe
from vrlt_fast.video.plan import plan_decode
from vrlt_fast.video.prefetch import Prefetcher
from vrlt_fast.video.preprocess import Geometry
from vrlt_fast.video.store.frame_cache import CacheSettings, Decoded, FrameCache
from vrlt_kernels import NV12, patchify

GEOMETRY = Geometry(14, 2)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COPY, EAGER, KERNEL, PEER = "copy", "eager", "patchify", "torchcodec + transformers"
_SECONDS = 1.0  # that a rate is measured for


@dataclass
class Scene:
    """Where and how large.

    Args:
        device: "cuda" or "cpu".
        small: whether it works, not how fast it is.
        folder: where the videos are made and kept.
    """

    device: torch.device
    small: bool
    folder: Path
    workers: int

    @cached_property
    def path(self) -> Path:
        return make(Clip(180, 4) if self.small else Clip(1080, 20), self.folder)

    @cached_property
    def index(self) -> VideoIndex:
        return probe(self.path)

    @property
    def shape(self) -> str:
        return f"{self.index.height}p"

    def frames(self, count: int = 32) -> list[int]:
        count = min(count, 8) if self.small else count
        return [round(i * (self.index.n_frames - 1) / (count - 1)) for i in range(count)]

    @property
    def size(self) -> tuple[int, int]:
        return (84, 140) if self.small else (560, 1008)

    def decoders(self) -> dict[str, Callable[[], Backend]]:
        """GPU decoders that can run here; on the CPU the embedded one stands in."""
        found: dict[str, Callable[[], Backend]] = {}
        if self.device.type == "cpu":
            return {"pyav": PyAVBackend}
        for name, maker in (
            ("dali", lambda: DaliBackend("cuda", files=1)),
            ("torchcodec", lambda: TorchcodecBackend("cuda")),
        ):
            backend: Backend = maker()
            if backend.availability().ok and not backend.supports(self.index):
                found[name] = maker
        if not found:
            raise RuntimeError(f"no GPU decoder: {nvdec.availability().reason or 'DALI and torchcodec are missing'}")
        return found

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def h1(scene: Scene) -> Iterable[Record]:
    """Frames a second of the files' timeline, over sessions, with and without packets left out."""
    can = nvdec.capability("h264", "420", 8)
    if can is not None:
        yield summarize("device", "NVDEC", "engines", "count", [can.engines])
    for name, maker in scene.decoders().items():
        for sessions in (1, 2) if scene.small else (1, 7, 4, 10):
            for elide in (True, False):
                rate = _rate(scene, [maker() for _ in range(sessions)], elide=elide)
                shape = f"H1 {scene.shape} sessions={sessions}{' elide' if elide else ''}"
                yield summarize(name, shape, "rate", "frames/s", [rate])


def _rate(scene: Scene, backends: list[Backend], *, elide: bool) -> float:
    """Frames that a decoder would have to see without elision, a second of all sessions together."""
    plan = plan_decode(scene.index, scene.frames(), elide=elide)
    seen = sum(len(segment.packets) + segment.dropped for segment in plan.segments)
    done, errors, stop = [0] * len(backends), [], threading.Event()
    start = threading.Barrier(len(backends) + 1)

    def work(number: int) -> None:
        try:
            backends[number].decode(plan, lambda frame, picture: None)  # makes decoders and pipelines
        except Exception as error:
            errors.append(error)
        start.wait()
        while not (stop.is_set() or errors):
            backends[number].decode(plan, lambda frame, picture: None)
            done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(backends))]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(0.2 if scene.small else _SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    scene.wait()
    if errors:
        raise errors[0]
    return sum(done) * seen / (time.perf_counter() - began)


def h2(scene: Scene) -> Iterable[Record]:
    """The fused kernel beside a copy of as many bytes and the eager chain; milliseconds for 32 frames."""
    generator = torch.Generator(scene.device).manual_seed(5)
    count = 2 if scene.small else 32
    height, width = (90, 160) if scene.small else (1080, 1920)
    options: Any = {"dtype": torch.uint8, "device": scene.device, "generator": generator}
    rgb = torch.randint(0, 256, (count, height, width, 3), **options)
    y = torch.randint(16, 236, (count, height, width), **options)
    uv = torch.randint(16, 241, (count, height // 2, width // 2, 2), **options)
    pixels = count * scene.size[0] * scene.size[1] * 3
    mean, std = (torch.tensor(x, device=scene.device).view(3, 1, 1) for x in (MEAN, STD))

    def eager() -> torch.Tensor:
        x = rgb.permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=scene.size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return _packed(((x / 255 - mean) / std).to(torch.bfloat16))

    def fused(frames: Any, **more: Any) -> Callable[[], torch.Tensor]:
        return lambda: patchify(frames, scene.size, **more)

    normal: Any = {"normalize": (MEAN, STD), "dtype": torch.bfloat16, "resample": "float"}
    steps = {
        f"{KERNEL} NV12": (fused(NV12(y, uv)), y.numel() + uv.numel() + pixels),
        f"{KERNEL} RGB": (fused(rgb), rgb.numel() + pixels),
        f"{KERNEL} RGB bf16": (fused(rgb, **normal), rgb.numel() + 2 * pixels),
        f"{EAGER} RGB bf16": (eager, rgb.numel() + 2 * pixels),
    }
    shape = f"H2 {count} frames {height}p"
    arms = {name: Arm(step) for name, (step, _) in steps.items()}
    for name, (_, size) in steps.items():
        arms[f"{COPY} of {name}"] = measure.copy(torch.empty(size // 2, dtype=torch.uint8, device=scene.device))
    clock = measure.Clock(scene.device)
    for arm in arms.values():
        for _ in range(3):
            clock(arm)
    rounds = 3 if scene.small else 30
    host = {name: clock.host(arm) for name, arm in arms.items()}
    for name, values in measure.interleaved(arms, clock, dict.fromkeys(arms, rounds), host).items():
        yield summarize(name, shape, "time", "ms", values)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """[F, 3, H, W] to patches, as transformers does it."""
    t, h, w, p, m = len(x) // 2, x.shape[2] // 14, x.shape[3] // 14, 14, 2
    x = x.view(t, 2, 3, h // m, m, p, w // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, -1)


def h3(scene: Scene) -> Iterable[Record]:
    """File to patches on the device, ours beside torchcodec's NVDEC with transformers' processor; seconds."""
    frames, sizes = scene.frames(), scene.size
    steps: dict[str, Callable[[], Any]] = {}
    try:
        peer, sizes = _peer(scene, frames)
        steps[PEER] = peer
    except Exception as error:  # of somebody else's code
        yield summarize(PEER, " ".join(f"H3: {type(error).__name__}: {error}".split())[:300], "not run", "", [0.0])
    names = {"dali": "dali", "torchcodec": "torchcodec-cuda", "pyav": "pyav"}
    for name in scene.decoders():
        steps[f"ours, {name}"] = _ours(scene, Decoder(names[name]), frames, sizes)
    shape = f"H3 {len(frames)} frames {scene.shape}"
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 if scene.small else 7):
        for name, step in steps.items():
            scene.wait()
            began = time.perf_counter()
            step()
            scene.wait()
            times[name].append(time.perf_counter() - began)
    for name, values in times.items():
        yield summarize(name, shape, "time", "s", values)


def _ours(scene: Scene, decoder: Decoder, frames: list[int], size: tuple[int, int]) -> Callable[[], Any]:
    return lambda: decoder.patches(probe(scene.path), frames, size, GEOMETRY)


def _peer(scene: Scene, frames: list[int]) -> tuple[Callable[[], Any], tuple[int, int]]:
    """The peer's step, and the size to which it resizes."""
    decoders = import_module("torchcodec.decoders")
    processor = import_module("transformers").Qwen2VLVideoProcessor(cap_pixels_per_frame=True)
    device = str(scene.device)

    def step() -> Any:
        video = decoders.VideoDecoder(str(scene.path), device=device).get_frames_at(frames).data
        return processor(videos=[video], do_sample_frames=False, return_tensors="pt", device=device)

    grid = step()["video_grid_thw"][0].tolist()
    return step, (grid[1] * 14, grid[2] * 14)


def h4(scene: Scene) -> Iterable[Record]:
    """Clips a second of the GPU's decoder, of the CPU's, and of both from one queue."""
    frames = scene.frames()
    gpu = next(iter(scene.decoders()))
    lanes = {"NVDEC": (Decoder({"torchcodec": "torchcodec-cuda"}.get(gpu, gpu)), 1 if scene.small else 4)}
    with Decoder("pyav", workers=scene.workers) as cpu:
        lanes["CPU"] = (cpu, 1 if scene.small else 4)
        for name in ("NVDEC", "CPU", "both"):
            chosen = list(lanes.values()) if name == "both" else [lanes[name]]
            for decoder, _ in chosen:
                decoder.patches(scene.index, frames, scene.size, GEOMETRY)
            clips = 4 if scene.small else 48
            rate = _queue(scene, chosen, frames, clips)
            yield summarize(name, f"H4 {clips} clips {scene.shape}", "rate", "clips/s", [rate])


def _queue(scene: Scene, lanes: list[tuple[Decoder, int]], frames: list[int], clips: int) -> float:
    queue: SimpleQueue[int] = SimpleQueue()
    for number in range(clips):
        queue.put(number)
    errors: list[Exception] = []

    def work(decoder: Decoder) -> None:
        try:
            while True:
                queue.get_nowait()
                decoder.patches(scene.index, frames, scene.size, GEOMETRY)
        except Empty:
            pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(decoder,)) for decoder, count in lanes for _ in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scene.wait()
    if errors:
        raise errors[0]
    return clips / (time.perf_counter() - began)


def h5(scene: Scene) -> Iterable[Record]:
    """Seconds of a step (matrix products on the clip's patches) with cached pixels, with clips that are decoded ahead,
    and with clips that are decoded when they are needed.
    """
    gpu = next(iter(scene.decoders()))
    decoder = Decoder({"torchcodec": "torchcodec-cuda"}.get(gpu, gpu))
    video = VideoConfig(min_pixels=28 * 28, max_pixels=scene.size[0] * scene.size[1])
    steps = 3 if scene.small else 12

    def decode(index: VideoIndex, frames: Any, size: tuple[int, int], geometry: Geometry) -> Decoded:
        return Decoded(decoder.patches(index, frames, size, geometry)[0].cpu())

    def loader(*, cached: bool) -> ClipLoader:
        settings = CacheSettings(host_bytes=4 * 2**30 if cached else 0)
        return ClipLoader(video, GEOMETRY, cache=FrameCache(settings), decode=decode)

    warm = loader(cached=True)
    tower = _Tower(scene, warm.load(scene.path).patches)
    order = [scene.path] * steps
    with Prefetcher(loader(cached=False), threads=2, depth=2) as ahead:
        ahead.expect(order)
        arms = {"cached": warm.load, "decoded ahead": ahead.load, "decoded when needed": loader(cached=False).load}
        for name, load in arms.items():
            times = []
            for path in order:
                began = time.perf_counter()
                tower(load(path).patches)
                times.append(time.perf_counter() - began)
            yield summarize(name, f"H5 {scene.shape}", "time", "s", times[1:])


class _Tower:
    """Matrix products of about three times what decoding takes, so that there is something to hide it behind."""

    def __init__(self, scene: Scene, patches: torch.Tensor) -> None:
        self.scene, self.repeats = scene, 1
        dtype = torch.float32 if scene.device.type == "cpu" else torch.bfloat16
        self.weight = torch.randn(patches.shape[1], patches.shape[1], dtype=dtype, device=scene.device)
        self(patches)
        began = time.perf_counter()
        self(patches)
        once = time.perf_counter() - began
        self.repeats = max(1, round((0.3 if scene.small else 1.5) / once))

    def __call__(self, patches: torch.Tensor) -> None:
        x = patches.to(self.scene.device, self.weight.dtype) / 255
        for _ in range(self.repeats):
            x = torch.tanh(x @ self.weight)
        self.scene.wait()
