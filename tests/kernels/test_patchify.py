"""patchify against torch's own resize and the layout of the towers; every backend against the reference."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vrlt_kernels as vk
from vrlt_kernels import _native
from vrlt_kernels.patchify import _native_plan
from vrlt_kernels.patchify_ref import axis

ROOT = Path(__file__).resolve().parent.parent.parent
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
GUARD = 171
FAST = [pytest.param("native", marks=pytest.mark.skipif(not _native.available(), reason=_native.reason())), "triton"]
native = pytest.mark.skipif(not _native.available(), reason=_native.reason())
pytestmark = pytest.mark.timeout(300)  # Triton's interpreter on a machine that may be busy


def pictures(generator, count, height, width, contrast=False):
    x = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    return (x > 127).to(torch.uint8) * 255 if contrast else x


def nv12(generator, count, height, width, **options):
    shape = (count, (height + 1) // 2, (width + 1) // 2, 2)
    uv = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return vk.NV12(pictures(generator, count, height, width)[..., 0], uv, **options)


def by_torch(frames, size, *, patch=14, merge=2, tubelet=2, dtype=torch.uint8):
    """F.interpolate of the whole clip, then the reshape of HF's processor."""
    x = frames.permute(0, 3, 1, 2).contiguous().to(dtype)
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
    x = x if dtype == torch.uint8 else x.round().clamp(0, 255).to(torch.uint8)
    h, w = size[0] // patch, size[1] // patch
    x = x.reshape(-1, tubelet, 3, h // merge, merge, patch, w // merge, merge, patch)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * tubelet * patch * patch)


def differing(got, want):
    """Share of the values that differ; by how much at most."""
    gap = (got.double() - want.double()).abs()
    return float((gap > 0).double().mean()), float(gap.max())


@pytest.mark.parametrize("backend", ["reference", FAST[0]])
def test_native_route_is_torchs_uint8_kernel_to_the_bit(backend, seed, generator):
    """Sizes that shrink, grow, stay, are odd, one pixel, and extreme in aspect."""
    draw = random.Random(seed)
    sides = (1, 2, 3, 7, 28, 33, 56, 101, 131, 224, 419)
    for i in range(40 if backend == "native" else 20):
        patch, merge, tubelet = draw.choice([(14, 2, 2), (16, 2, 2), (2, 1, 1), (3, 2, 3)])
        size = tuple(patch * merge * draw.randint(1, 160 // (patch * merge)) for _ in range(2))
        height, width = size if i % 8 == 0 else (draw.choice(sides), draw.choice(sides))
        frames = pictures(generator, 2 * tubelet, height, width, contrast=i % 3 == 0)
        options = {"patch": patch, "merge": merge, "tubelet": tubelet}
        with vk.use_backend(backend):
            got = vk.patchify(frames, size, **options)
        assert torch.equal(got, by_torch(frames, size, **options)), (height, width, size, options)


@pytest.mark.parametrize("backend", ["reference", FAST[0]])
@pytest.mark.parametrize("shape", [(1080, 1920), (720, 1280)])
def test_sizes_of_real_videos(backend, shape, generator):
    frames, size = pictures(generator, 2, *shape), (560, 1008)
    with vk.use_backend(backend):
        assert torch.equal(vk.patchify(frames, size), by_torch(frames, size))
        share, most = differing(
            vk.patchify(frames, size, resample="float"), by_torch(frames, size, dtype=torch.float32)
        )
    assert share < 1e-3
    assert most <= 1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("resample", ["native", "float"])
def test_backends_agree(backend, resample, seed, generator):
    """On RGB and NV12, turned or not, uint8 and normalised; the Triton kernel in its interpreter on small grids."""
    draw = random.Random(seed)
    for i in range(24 if backend == "native" else 4):
        patch, merge, tubelet = draw.choice([(14, 2, 2), (16, 2, 1), (3, 2, 3)])
        size = tuple(patch * merge * draw.randint(1, 2) for _ in range(2))
        height, width = draw.choice((5, 28, 37, 64)), draw.choice((1, 28, 45, 64))
        matrix = draw.choice(["bt601", "bt709", "bt2020"])
        frames = pictures(generator, tubelet, height, width)
        if i % 2:
            frames = nv12(generator, tubelet, height, width, matrix=matrix, full_range=i % 4 == 1)
        options = {"patch": patch, "merge": merge, "tubelet": tubelet, "resample": resample}
        options["rotation"] = (0, 90, 180, 270)[i % 4]
        if i % 3:
            options |= {"normalize": CLIP, "dtype": (torch.float32, torch.bfloat16)[i % 3 - 1]}
        want = vk.patchify_ref(frames, size, **options)
        with vk.use_backend(backend):
            got = vk.patchify(frames, size, **options)
        share, most = differing(got, want)
        one = 1 if not i % 3 else 1 / (255 * min(CLIP[1])) + 0.02
        assert (share, most) <= ((0, 0) if resample == "native" else (1e-2, one)), (i, height, width, size, options)
        assert most <= one


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_only_the_slots_named_are_written(backend, generator):
    """In any order, into rows with room between them."""
    frames, size = pictures(generator, 3, 20, 40), (28, 28)
    clip = torch.full((4 * 3, 1200), GUARD, dtype=torch.uint8)
    out, slots = clip[:, :1176], [4, 1, 3]
    with vk.use_backend(backend):
        vk.patchify_into(out, frames, slots, size)
    whole = torch.full((6, 20, 40, 3), 0, dtype=torch.uint8)
    whole[slots] = frames
    want = by_torch(whole, size).view(3, 4, 3, 2, 196)
    got = out.reshape(3, 4, 3, 2, 196)
    for slot in range(6):
        part = got[slot // 2, :, :, slot % 2]
        assert torch.equal(part, want[slot // 2, :, :, slot % 2]) if slot in slots else (part == GUARD).all()
    assert (clip[:, 1176:] == GUARD).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_normalised_results_leave_no_value_unwritten(backend, generator):
    frames = pictures(generator, 2, 30, 30)
    out = torch.full((4, 1176), torch.nan)
    with vk.use_backend(backend):
        vk.patchify_into(out, frames, torch.tensor([1, 0]), (28, 28), normalize=CLIP)
    mean, std = (torch.tensor(x).repeat_interleave(2 * 196) * 255.0 for x in CLIP)
    assert torch.equal(out, (by_torch(frames.flip(0), (28, 28)).float() - mean) / std)


@pytest.mark.parametrize("backend", ["reference", FAST[0]])
def test_strided_frames(backend, generator):
    """Padded lines, planar pictures, every other frame."""
    frames, size = pictures(generator, 4, 61, 50), (56, 56)
    padded = torch.nn.functional.pad(frames, (0, 0, 0, 14))[:, :, :50]
    planar = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    with vk.use_backend(backend):
        want = vk.patchify(frames, size)
        assert torch.equal(vk.patchify(padded, size), want)
        assert torch.equal(vk.patchify(planar, size), want)
        assert torch.equal(vk.patchify(frames[::2], size), by_torch(frames[::2], size))
        turned = torch.rot90(frames, 1, (1, 2))
        assert torch.equal(vk.patchify(frames, size, rotation=90), by_torch(turned, size))


@native
def test_threads_change_nothing(generator):
    frames, threads = pictures(generator, 3, 300, 200), torch.get_num_threads()
    out = [torch.full((2 * 16 * 20, 1176), GUARD, dtype=torch.uint8) for _ in range(2)]
    try:
        for count, clip in zip((1, 4), out, strict=True):
            torch.set_num_threads(count)
            vk.patchify_into(clip, frames, [0, 3, 2], (16 * 14, 20 * 14))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*out)


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_are_those_of_the_float_formula(matrix, full_range, generator):
    kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}[matrix]
    frames = nv12(generator, 2, 84, 84, matrix=matrix, full_range=full_range)
    u, v = (frames.uv.double() - 128).repeat_interleave(2, 1).repeat_interleave(2, 2).unbind(-1)
    y = frames.y.double()
    if not full_range:
        y, u, v = (y - 16) * 255 / 219, u * 255 / 224, v * 255 / 224
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    rgb = torch.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue], -1).round().clamp(0, 255)
    share, most = differing(vk.patchify(frames, (84, 84)), by_torch(rgb.to(torch.uint8), (84, 84)))
    assert share < 1e-3
    assert most <= 1


def test_operators_are_registered_properly(generator):
    op = getattr(torch.ops, vk.__name__)
    frames, size = pictures(generator, 2, 20, 24), [28, 28, 14, 2, 2]
    factors, mean_std = [0] * 6, torch.rand(2, 3, generator=generator) + 1
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    given = (frames, None, [0, 1], size, "native", 0, factors)
    torch.library.opcheck(op.patchify, (*given, None, torch.uint8), test_utils=tests)
    torch.library.opcheck(op.patchify, (*given, mean_std, torch.bfloat16), test_utils=tests)
    out = torch.zeros(4, 1176, dtype=torch.uint8)
    torch.library.opcheck(op.patchify_into, (out, *given, None), test_utils=tests)


def test_no_frames(generator):
    frames = pictures(generator, 2, 20, 20)
    assert vk.patchify(frames[:0], (28, 28)).shape == (0, 1176)
    out = torch.full((4, 1176), GUARD, dtype=torch.uint8)
    vk.patchify_into(out, frames[:0], [], (28, 28))
    assert (out == GUARD).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"frames": torch.zeros(2, 20, 20, 4, dtype=torch.uint8)}, "frames"),
        ({"frames": torch.zeros(2, 20, 20, 3)}, "frames"),
        ({"frames": torch.zeros(2, 0, 20, 3, dtype=torch.uint8)}, "frames"),
        ({"frames": vk.NV12(torch.zeros(2, 5, 5, dtype=torch.uint8), torch.zeros(2, 2, 3, 2).byte())}, "frames.uv"),
        ({"frames": vk.NV12(torch.zeros(2, 2, 2).byte(), torch.zeros(2, 1, 1, 2).byte(), "bt470")}, "frames.matrix"),
        ({"out": torch.zeros(4, 1176)}, "out"),
        ({"out": torch.zeros(4, 1175, dtype=torch.uint8)}, "out"),
        ({"out": torch.zeros(3, 1176, dtype=torch.uint8)}, "out"),
        ({"out": torch.zeros(1176, 4, dtype=torch.uint8).t()}, "out"),
        ({"out": torch.zeros(4, 1176, dtype=torch.uint8, device="meta")}, "out"),
        ({"slots": [0, 2]}, "slots"),
        ({"slots": [-1, 0]}, "slots"),
        ({"slots": [1, 1]}, "slots"),
        ({"slots": [1]}, "slots"),
        ({"size": (28, 42)}, "size"),
        ({"size": (0, 28)}, "size"),
        ({"size": (28,)}, "size"),
        ({"patch": 0}, "patch"),
        ({"resample": "nearest"}, "resample"),
        ({"rotation": 45}, "rotation"),
        ({"normalize": ((0.5,) * 3, (0.0,) * 3)}, "normalize"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    good = {"out": torch.full((4, 1176), GUARD, dtype=torch.uint8), "slots": [0, 1], "size": (28, 28)}
    given = good | {"frames": torch.zeros(2, 20, 20, 3, dtype=torch.uint8)} | change
    with pytest.raises(vk.KernelInputError, match=f"^{named}: "):
        vk.patchify_into(given.pop("out"), given.pop("frames"), given.pop("slots"), given.pop("size"), **given)
    assert (good["out"] == GUARD).all()


def test_wrong_arguments_of_patchify():
    frames = torch.zeros(3, 20, 20, 3, dtype=torch.uint8)
    with pytest.raises(vk.KernelInputError, match=r"^frames: got 3 frames"):
        vk.patchify(frames, (28, 28))
    for options in ({"dtype": torch.float32}, {"dtype": torch.uint8, "normalize": CLIP}):
        with pytest.raises(vk.KernelInputError, match=r"^dtype: "):
            vk.patchify(frames[:2], (28, 28), **options)


@native
def test_compiled_operator_refuses_what_could_leave_memory():
    """It checks for itself: shapes, slots and plans that aren't of these sizes."""
    ops = torch.ops.vrlt_native
    low, end = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
    weights = torch.full((2, 2), 8192, dtype=torch.int16)
    ops.patchify_plan(low, end, weights, 14, 3, False, -1)
    with pytest.raises(RuntimeError, match="reads pixels"):
        ops.patchify_plan(low, end, weights, 14, 2, False, -1)
    with pytest.raises(RuntimeError, match="level"):
        ops.patchify_plan(low, end, weights, 14, 3, False, 9)
    size = (28, 28, 14, 2, 2)
    across, down = _native_plan(30, 28, "native", False), _native_plan(20, 28, "native", True)
    frames, nothing = torch.zeros(2, 20, 30, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    out, rest = torch.zeros(4, 1176, dtype=torch.uint8), (0, torch.zeros(6, dtype=torch.int32), torch.empty(0))
    ops.patchify_(out, frames, nothing, torch.tensor([0, 1]), across, down, *size, *rest)
    for wrong in (
        (out, frames, nothing, torch.tensor([0, 2]), across, down),
        (out[:3], frames, nothing, torch.tensor([0, 1]), across, down),
        (out, frames[:, :19], nothing, torch.tensor([0, 1]), across, down),
        (out, frames, nothing, torch.tensor([0, 1]), down, across),
        (out, frames, nothing, torch.tensor([0, 1]), across[:64].clone(), down),
        (out, frames[..., :2], nothing, torch.tensor([0, 1]), across, down),
    ):
        with pytest.raises(RuntimeError):
            ops.patchify_(*wrong, *size, *rest)


@native
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level, seed, generator):
    """What the machine has, against the reference; weights that don't split into two bytes among them."""
    ops, draw = torch.ops.vrlt_native, random.Random(seed)
    for i in range(12):
        resample, side = ("native", "float")[i % 2], draw.randint(1, 400)
        tables = [axis(side, 56, resample), axis(side + 3, 28, resample)]
        try:
            plans = [
                ops.patchify_plan(t.low, t.end, t.weights, t.precision, n, i == 1, level)
                for i, (t, n) in enumerate(zip(tables, (side, side + 3), strict=True))
            ]
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])
        frames = pictures(generator, 2, side + 3, side)
        out, none = torch.zeros(8, 1176, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
        rest = (28, 56, 14, 2, 2, 0, torch.zeros(6, dtype=torch.int32), torch.empty(0))
        ops.patchify_(out, frames, none, torch.tensor([0, 1]), *plans, *rest)
        share, most = differing(out, vk.patchify_ref(frames, (28, 56), resample=resample))
        assert (share, most) <= ((0, 0) if resample == "native" else (1e-2, 1)), side


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_core_under_the_sanitizers(tmp_path, seed):
    """The torch-free core with every instruction set of the machine, between guarded buffers."""
    flags = {
        "generic": [],
        "avx2": ["-mavx2", "-mfma"],
        "vbmi": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni", "-mfma"],
    }
    x86 = platform.machine() in ("x86_64", "AMD64")
    common = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    common += ["-Wno-uninitialized", "-fsanitize=address", f"-I{ROOT / 'csrc'}"]
    common += [f"-I{ROOT / 'tests/csrc'}"]
    kernels = [(name, more) for name, more in flags.items() if x86 or not more]
    jobs = [[*common, *more, "-c", f"{ROOT}/csrc/patchify_{name}.cpp"] for name, more in kernels]
    jobs += [[*common, "-c", f"{ROOT}/csrc/patchify_{name}.cpp"] for name in ("plan", "cpu")]
    jobs += [[*common, "-c", f"{ROOT}/tests/csrc/patchify_test.cpp"]]
    jobs += [[*common, *(f"patchify_{job[-1].rpartition('patchify_')[2][:-4]}.o" for job in jobs), "-o", "program"]]
    for job in [*jobs, ["./program", str(seed)]]:
        done = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")
