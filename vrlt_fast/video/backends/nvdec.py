"""What the GPU's decoder can do here: whether the driver's library loads, which codecs and sizes it takes."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache

from vrlt_fast.video.backends.base import Availability
from vrlt_fast.video.index import VideoIndex

# cudaVideoCodec and cudaVideoChromaFormat of the Video Codec SDK
_CODECS = {
    "mpeg1video": 0,
    "mpeg2video": 1,
    "mpeg4": 2,
    "h264": 4,
    "mjpeg": 5,
    "hevc": 8,
    "vp8": 9,
    "vp9": 10,
    "av1": 11,
}
_CHROMA = {"400": 0, "420": 1, "422": 2, "444": 3}
_EVERYWHERE = {"h264", "hevc", "vp9"}  # 8-bit 4:2:0, every card that a current driver supports
_PIXELS = re.compile(r"(?:yuvj?|yuva)(4\d\d)p(\d+)?(?:le|be)?|gray(\d+)?(?:le|be)?")


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte),
        ("counter_depth", ctypes.c_ubyte),
        ("max_bins", ctypes.c_ushort),
        ("reserved3", ctypes.c_uint * 10),
    )


@dataclass(frozen=True)
class Capability:
    """``engines``: decoders on the chip; sizes in pixels, ``max_macroblocks`` of 16 x 16 pixels."""

    supported: bool
    engines: int = 0
    min_size: tuple[int, int] = (0, 0)
    max_size: tuple[int, int] = (0, 0)
    max_macroblocks: int = 0


@cache
def availability(ordinal: int = 0) -> Availability:
    """Whether this process can reach NVDEC of the CUDA device with this number. Never raises."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Availability(False, f"torch can't be imported: {error}", "pip install torch")
    if torch.version.cuda is None:
        return Availability(False, "this torch is built without CUDA", "install torch with CUDA: pytorch.org")
    if not torch.cuda.is_available():
        return Availability(False, "no CUDA device", "run on a machine with an NVIDIA GPU and its driver")
    if ordinal >= torch.cuda.device_count():
        return Availability(False, f"no CUDA device {ordinal}", f"choose one of {torch.cuda.device_count()}")
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        return Availability(
            False,
            f"the driver's decoder library doesn't load: {error}",
            "in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; else install the driver's libnvcuvid",
        )
    return Availability(True)


def layout(pixels: str) -> tuple[str, int] | None:
    """Chroma subsampling ("400", "420", "422", "444") and bit depth of FFmpeg's planar YUV formats; None for others."""
    if pixels in ("nv12", "nv21"):
        return "420", 8
    found = _PIXELS.fullmatch(pixels)
    if not found:
        return None
    chroma = found[1] or "400"
    return (chroma, int(found[2] or found[3] or 8)) if chroma in _CHROMA else None


@cache
def capability(codec: str, chroma: str, depth: int, ordinal: int = 0) -> Capability | None:
    """What the driver says; None where it can't be asked."""
    if not availability(ordinal).ok or codec not in _CODECS:
        return None
    import torch

    caps = _Caps(codec=_CODECS[codec], chroma=_CHROMA[chroma], depth_minus_8=depth - 8)
    with torch.cuda.device(ordinal):
        torch.zeros(1, device="cuda")  # the question is put to the current context
        if ctypes.CDLL("libnvcuvid.so.1").cuvidGetDecoderCaps(ctypes.byref(caps)):
            return None
    return Capability(
        bool(caps.supported),
        caps.engines,
        (caps.min_width, caps.min_height),
        (caps.max_width, caps.max_height),
        caps.max_macroblocks,
    )


def refusal(index: VideoIndex, ordinal: int = 0) -> str:
    """Why NVDEC doesn't take the file; empty where it does."""
    codec, kind = index.codec, layout(index.pixels)
    if kind is None or codec not in _CODECS:
        return f"NVDEC doesn't decode {codec} {index.pixels}"
    if "interlaced" in index.flags:
        return "interlaced pictures are left to the CPU"
    chroma, depth = kind
    can = capability(codec, chroma, depth, ordinal)
    if can is None:
        return (
            ""
            if codec in _EVERYWHERE and kind == ("420", 8)
            else f"nothing says that NVDEC decodes {codec} {index.pixels}"
        )
    if not can.supported:
        return f"this GPU's NVDEC doesn't decode {codec} {index.pixels}"
    width, height = index.width, index.height
    too_small = width < can.min_size[0] or height < can.min_size[1]
    blocks = -(-width // 16) * -(-height // 16)
    if too_small or width > can.max_size[0] or height > can.max_size[1] or blocks > can.max_macroblocks:
        return f"this GPU's NVDEC doesn't decode {codec} of {width} x {height}"
    return ""
