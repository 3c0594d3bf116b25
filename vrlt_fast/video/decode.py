"""Video files to RGB frames, matched by presentation time.

PyAV, one sequential pass: every frame up to the last one asked for is decoded, so the frames returned are those that a
plain sequential decode gives. Problems with a file are :class:`~vrlt_fast.errors.VideoError`; they cost a sample, not
a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vrlt_fast.video.index import VideoIndex, open_video, video_error


def decode_frames(index: VideoIndex, frames: Sequence[int]) -> np.ndarray:
    """RGB frames, uint8 [len(frames), H, W, 3], turned upright where the file says so.

    Args:
        index: from :func:`probe`.
        frames: presentation-order frame numbers, any order, repeats allowed.

    Raises:
        VideoError: V02, V04 or V05 when a frame can't be decoded, never another frame in its place; V06 when the frames
            differ in size.
    """
    import av

    if not len(frames):
        raise ValueError("no frames asked for")
    wanted = set(frames)
    if min(wanted) < 0 or max(wanted) >= index.n_frames:
        raise video_error("VRLT-V05", index.path, f"frame {max(wanted)} asked for, the file has {index.n_frames}")
    last, pictures, decoded = max(wanted), {}, False
    with open_video(index.path) as (container, stream):
        try:
            for frame in container.decode(stream):
                if frame.pts is None or frame.is_corrupt:
                    continue
                decoded = True
                # By absolute time: a stream cut in the middle of a GOP starts with packets that give no frame.
                number = int(np.searchsorted(index.ticks, frame.pts))
                if number in wanted and index.ticks[number] == frame.pts:
                    picture = frame.to_ndarray(format="rgb24")
                    pictures[number] = np.rot90(picture, k=(frame.rotation // 90) % 4) if frame.rotation else picture
                if number >= last:
                    break
        except (av.error.FFmpegError, ValueError) as error:
            raise video_error("VRLT-V02", index.path, "decoding failed", str(error)) from None
    if not decoded:
        raise video_error("VRLT-V04", index.path, "video has no decodable frames")
    missing = sorted(wanted - pictures.keys())
    if missing:
        raise video_error(
            "VRLT-V05",
            index.path,
            f"{len(missing)} of {len(wanted)} frames can't be decoded, the first is {missing[0]}",
        )
    sizes = {picture.shape for picture in pictures.values()}
    if len(sizes) > 1:
        why = " and ".join(f"{width} x {height}" for height, width, _ in sorted(sizes))
        raise video_error("VRLT-V06", index.path, "the frame size changes within the video", why)
    return np.stack([pictures[i] for i in frames])
