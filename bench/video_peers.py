"""The peers of the case ``video``: qwen-vl-utils' ``fetch_video`` and transformers' ``Qwen2VLVideoProcessor``.

Runs in the interpreter where they are installed: ``python -m bench.video_peers JOB``; without a job it prints versions
and, of what can't be imported, why. It imports nothing of ours.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.video_arm import Job, serve

MODULES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "qwen-vl-utils": "qwen_vl_utils",
    "torchcodec": "torchcodec.decoders",
    "decord": "decord",
}
_HEAD = 2048  # rows that are kept as floats for parity


def torchvision_imports() -> None:
    """Let PyPI's torchvision, built for CUDA, be imported beside torch for the CPU: it describes two operators that its
    library, which can't be loaded, should have declared.
    """
    import torch

    global _declared
    _declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declared: Any = None


def versions() -> dict[str, str]:
    """Of each package; what begins with "!" says why it can't be used."""
    found = {}
    for package, module in MODULES.items():
        try:
            importlib.import_module(module)
            found[package] = importlib.metadata.version(package)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found[package] = f"!{type(error).__name__}: {lines[0][:200]}"
    return found


def _module(name: str) -> Any:
    """Untyped: whether these are there depends on the interpreter."""
    return importlib.import_module(name)


class Peer:
    """Decode, resize and normalise as the peer's users do; or only decode."""

    def __init__(self, job: Job):
        self.job, self.result = job, None
        self.reader = "decord" if job.arm == "decord" else "torchcodec"
        if job.stage == "pixels":
            from transformers import Qwen2VLVideoProcessor

            known = Qwen2VLVideoProcessor.valid_kwargs.__annotations__
            # Without the cap a long video gets several times the pixels that qwen-vl-utils gives it.
            self.processor = Qwen2VLVideoProcessor(**{k: True for k in ("cap_pixels_per_frame",) if k in known})

    def step(self) -> dict[str, float]:
        self.result = self._frames() if self.job.stage == "frames" else self._pixels()
        return {}

    def drop(self) -> None:
        self.result = None

    def save(self, path: Path) -> None:
        import numpy as np

        if self.job.stage == "frames":
            np.save(path / "levels.npy", np.asarray(self.result).reshape(len(self.job.frames), -1))
            return
        mean = np.repeat(np.float32(self.processor.image_mean), 2 * 14 * 14)
        std = np.repeat(np.float32(self.processor.image_std), 2 * 14 * 14)
        values: Any = self.result
        np.save(path / "head.npy", values[:_HEAD].numpy())
        levels = np.empty(values.shape, np.uint8)
        for i in range(0, len(levels), 4096):
            levels[i : i + 4096] = ((values[i : i + 4096].numpy() * std + mean) * 255).round()
        np.save(path / "levels.npy", levels)

    def _read(self) -> Any:
        """RGB frames by number: [n, 3, H, W] of torchcodec, [n, H, W, 3] of decord; torch, uint8."""
        if self.reader == "decord":
            import torch

            reader = _module("decord").VideoReader(self.job.video)
            return torch.tensor(reader.get_batch(self.job.frames).asnumpy())
        threads = int(os.environ["TORCHCODEC_NUM_THREADS"])
        decoder = _module("torchcodec.decoders").VideoDecoder(self.job.video, num_ffmpeg_threads=threads)
        return decoder.get_frames_at(indices=self.job.frames).data

    def _frames(self) -> Any:
        frames = self._read()
        return frames if self.reader == "decord" else frames.permute(0, 2, 3, 1)

    def _pixels(self) -> Any:
        job, resized = self.job, False
        if job.arm == "transformers":  # its own resize, of bytes
            video: Any = self._read()
        elif job.spread:
            fetch = _module("qwen_vl_utils.vision_process").fetch_video
            video, found = fetch({"video": job.video, "nframes": len(job.frames)}, return_video_metadata=True)
            if list(found["frames_indices"]) != job.frames:
                raise RuntimeError(f"frames {found['frames_indices']} instead of {job.frames}")
            resized = True
        else:  # fetch_video's steps for frames that it can't be asked for
            transforms = _module("torchvision.transforms")
            video = self._read()
            video = video.permute(0, 3, 1, 2) if self.reader == "decord" else video
            mode = transforms.InterpolationMode.BICUBIC
            video = transforms.functional.resize(video, list(job.size), interpolation=mode, antialias=True).float()
            resized = True
        out = self.processor(videos=[video], do_resize=not resized, return_tensors="pt")
        return out["pixel_values_videos"]


def main(argv: list[str]) -> int:
    torchvision_imports()
    if not argv:
        text = json.dumps(versions())
        sys.stdout.write(f"\n{text}\n")
        return 0
    return serve(Job(**json.loads(argv[0])), Peer)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
