"""patchify's Triton kernel on a CUDA device against the reference on the CPU, to the bit on the fixed-point route.

With GPU_CHECK_SMALL=1 and no device Triton's interpreter or the compiled operator tries the tests themselves.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

import vrlt_kernels as vk

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
GUARD = 171
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (CUDA or os.environ.get("GPU_CHECK_SMALL")),
        reason="needs a CUDA device, or GPU_CHECK_SMALL=1 to try it without",
    ),
]


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(generator: torch.Generator, count: int, height: int, width: int, *, extreme: bool = False) -> torch.Tensor:
    x = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    return (x > 127).to(torch.uint8) * 255 if extreme else x


def planes(generator: torch.Generator, count: int, height: int, width: int, matrix: str, full: bool) -> vk.NV12:
    shape = (count, (height + 1) // 2, (width + 1) // 2, 2)
    uv = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return vk.NV12(pictures(generator, count, height, width)[..., 0], uv, matrix=matrix, full_range=full)


def moved(frames: torch.Tensor | vk.NV12) -> torch.Tensor | vk.NV12:
    if isinstance(frames, vk.NV12):
        return frames._replace(y=frames.y.to(DEVICE), uv=frames.uv.to(DEVICE))
    return frames.to(DEVICE)


@pytest.mark.parametrize("kind", ["rgb", "extreme", "nv12"])
@pytest.mark.parametrize("resample", ["native", "float"])
def test_random_sizes(kind: str, resample: str, seed: int, generator: torch.Generator) -> None:
    """Shrunk, grown, one pixel wide, turned; uint8 and normalised."""
    draw = random.Random(seed)
    sides = (1, 2, 7, 28, 33, 101, 224, 419, 720)
    for i in range(12):  # a geometry each, since each compiles anew
        patch, merge, tubelet = ((14, 2, 2), (16, 2, 2), (3, 2, 3))[i % 3]
        size = tuple(patch * merge * draw.randint(1, 280 // (patch * merge)) for _ in range(2))
        height, width = draw.choice(sides), draw.choice(sides)
        frames: torch.Tensor | vk.NV12 = pictures(generator, tubelet, height, width, extreme=kind == "extreme")
        if kind == "nv12":
            matrix = draw.choice(["bt601", "bt709", "bt2020"])
            frames = planes(generator, tubelet, height, width, matrix, full=i % 4 == 1)
        options: dict = {"patch": patch, "merge": merge, "tubelet": tubelet, "resample": resample}
        options["rotation"] = (0, 90, 180, 270)[i // 3]
        if i % 3:
            options |= {"normalize": CLIP, "dtype": (torch.float32, torch.bfloat16)[i % 3 - 1]}
        want = vk.patchify_ref(frames, size, **options)
        got = vk.patchify(moved(frames), size, **options).cpu()
        at = (i, height, width, size, options)
        if resample == "native":
            assert torch.equal(got, want), at
            continue
        gap = (got.double() - want.double()).abs()
        assert float(gap.max()) <= (1 if not i % 3 else 1 / (255 * min(CLIP[1])) + 0.02), at
        # ties of upscaled black and white are common, and the order of a sum decides them
        assert float((gap > 0).double().mean()) < (5e-2 if kind == "extreme" else 1e-2), at


@pytest.mark.parametrize("shape", [(1080, 1920), (720, 1280), (2160, 3840)])
def test_sizes_of_real_videos(shape: tuple[int, int], generator: torch.Generator) -> None:
    frames, size = pictures(generator, 2, *shape), (560, 1008)
    assert torch.equal(vk.patchify(frames.to(DEVICE), size).cpu(), vk.patchify_ref(frames, size))
    gap = vk.patchify(frames.to(DEVICE), size, resample="float").cpu().int()
    gap = (gap - vk.patchify_ref(frames, size, resample="float").int()).abs()
    assert int(gap.max()) <= 1
    assert float((gap > 0).double().mean()) < 1e-3


def test_only_the_slots_named_are_written(generator: torch.Generator) -> None:
    """In any order, into rows with room between them, from lines with padding."""
    frames, size = pictures(generator, 3, 100, 90), (56, 84)
    padded = torch.nn.functional.pad(frames, (0, 0, 0, 38)).to(DEVICE)[:, :, :90]
    clip = torch.full((24 * 3, 1200), GUARD, dtype=torch.uint8, device=DEVICE)
    vk.patchify_into(clip[:, :1176], padded, [4, 1, 3], size)
    want = torch.full((24 * 3, 1200), GUARD, dtype=torch.uint8)
    with vk.use_backend("reference"):
        vk.patchify_into(want[:, :1176], frames, [4, 1, 3], size)
    assert torch.equal(clip.cpu(), want)


def test_more_than_two_to_the_31_bytes_of_frames(generator: torch.Generator) -> None:
    """The last of them is read where it lies."""
    if not CUDA:
        pytest.skip("for a device with room")
    last = pictures(generator, 2, 1080, 1920)
    frames = torch.zeros(400, 1080, 1920, 3, dtype=torch.uint8, device=DEVICE)
    frames[-2:] = last.to(DEVICE)
    got = vk.patchify(frames, (56, 112))
    assert torch.equal(got[-32:].cpu(), vk.patchify_ref(last, (56, 112)))
    assert not got[:-32].any()
