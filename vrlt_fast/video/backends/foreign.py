"""What the decoders that aren't ours have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vrlt_fast.errors import VideoError
from vrlt_fast.video.index import VideoIndex, video_error


def pictures_of(index: VideoIndex, pictures: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """The same; what native code raises on the way is a problem of the file, but want of memory isn't.

    Raises:
        VideoError: V02.
    """
    while True:
        try:
            found = next(pictures, None)
        except (torch.OutOfMemoryError, MemoryError, VideoError):
            raise
        except Exception as error:  # each library has its own kinds
            why = " ".join(str(error).split())[:300]
            raise video_error("VRLT-V02", index.path, "decoding failed", why) from None
        if found is None:
            return
        yield found


def upright(index: VideoIndex, picture: torch.Tensor) -> torch.Tensor:
    """Turned as the file says.

    Args:
        picture: uint8 [H, W, 3] as it is coded.

    Raises:
        VideoError: V06 where its size isn't the file's.
    """
    if picture.shape != (index.height, index.width, 3):
        why = f"{tuple(picture.shape)} instead of {(index.height, index.width, 3)}"
        raise video_error("VRLT-V06", index.path, "the decoder's pictures have another size", why)
    return torch.rot90(picture, index.rotation // 90).contiguous() if index.rotation else picture
