"""What NAL units of H.264 and HEVC tell about packets, without decoding: which pictures no other picture refers to, and
at which ones decoding can start exactly. Only headers are read. Other codecs tell nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_DISPLAY_ORIENTATION, _RECOVERY_POINT = 47, 6


@dataclass(frozen=True)
class Picture:
    """One packet. ``reference``: other pictures may refer to it, of any layer if ``layer`` (the temporal one) isn't
    the highest of the stream; ``start``: decoding can start here; ``leading``: pictures that follow in the file and are
    shown before it may refer to earlier ones; ``turned``: it carries a display orientation; ``setup``: its sequence
    parameter sets.
    """

    reference: bool
    layer: int
    start: bool
    leading: bool
    turned: bool
    setup: tuple[bytes, ...]


def length_size(codec: str, extradata: bytes | None) -> int:
    """Bytes of the length before each NAL unit, from avcC or hvcC; 0 for start codes (Annex B)."""
    at = {"h264": 4, "hevc": 21}[codec]
    if not extradata or extradata[0] != 1 or len(extradata) <= at:
        return 0
    return (extradata[at] & 3) + 1


def _units(packet: memoryview, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each NAL unit. Stops silently where lengths leave the packet."""
    total = len(packet)
    if size:
        at = 0
        while at + size < total:
            length = int.from_bytes(packet[at : at + size], "big")
            at += size
            if not length or at + length > total:
                return
            yield at, at + length
            at += length
        return
    data = bytes(packet)
    at = data.find(b"\0\0\1")
    while at >= 0:
        after = data.find(b"\0\0\1", at + 3)
        end = after if after >= 0 else total
        if end > at + 3:
            yield at + 3, end
        at = after


def _plain(unit: bytes) -> bytes:
    """Without the bytes that keep start codes out of the payload."""
    return unit.replace(b"\0\0\3", b"\0\0")


def _messages(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each SEI message."""
    at = 0
    while at + 2 < len(payload):
        values = []
        for _ in range(2):
            value = 0
            while at < len(payload) and payload[at] == 0xFF:
                value, at = value + 255, at + 1
            if at >= len(payload):
                return
            value, at = value + payload[at], at + 1
            values.append(value)
        yield values[0], payload[at : at + values[1]]
        at += values[1]


def _exact_recovery(content: bytes) -> bool:
    """recovery_frame_cnt is 0 (one bit, as ue(v)), exact_match_flag is set and broken_link_flag isn't."""
    return len(content) > 0 and content[0] >> 7 == 1 and content[0] >> 6 & 1 == 1 and not content[0] >> 5 & 1


def h264_picture(packet: memoryview, size: int, *, key: bool) -> Picture | None:
    """``size`` from :func:`length_size`; ``key``: the container's opinion. None without a picture inside."""
    reference = instant = recovery = turned = False
    pictures, setup = 0, []
    for start, end in _units(packet, size):
        kind = packet[start] & 31
        if 1 <= kind <= 5:
            pictures += 1
            reference |= packet[start] & 0x60 != 0
            instant |= kind == 5
        elif kind == 7:
            setup.append(bytes(packet[start:end]))
        elif kind == 6 and key:
            for message, content in _messages(_plain(bytes(packet[start + 1 : end]))):
                recovery |= message == _RECOVERY_POINT and _exact_recovery(content)
                turned |= message == _DISPLAY_ORIENTATION
    if not pictures:
        return None
    # an I picture without these promises is no start: later ones may refer to pictures before it
    return Picture(reference, 0, instant or (key and recovery), not instant, turned, tuple(setup))


def hevc_picture(packet: memoryview, size: int, *, key: bool) -> Picture | None:
    """As :func:`h264_picture`, of the base layer."""
    reference = start_here = turned = False
    leading, pictures, layer, setup = True, 0, 0, []
    for start, end in _units(packet, size):
        if end - start < 2:
            continue
        kind = packet[start] >> 1 & 63
        if (packet[start] & 1) << 5 | packet[start + 1] >> 3:
            continue  # of another layer: a second view or a finer picture, which nobody decodes
        if kind < 32:
            pictures += 1
            reference |= not (kind < 16 and kind % 2 == 0)
            layer = max(layer, (packet[start + 1] & 7) - 1)
            start_here |= 16 <= kind <= 21
            leading &= kind not in (17, 18, 19, 20)  # BLA without RASL pictures, and IDR
        elif kind == 33:
            setup.append(bytes(packet[start:end]))
        elif kind == 39 and key:
            messages = _messages(_plain(bytes(packet[start + 2 : end])))
            turned |= any(message == _DISPLAY_ORIENTATION for message, _ in messages)
    if not pictures:
        return None
    return Picture(reference, layer, start_here, leading, turned, tuple(setup))


READERS = {"h264": h264_picture, "hevc": hevc_picture}


def droppable(pictures: list[Picture | None]) -> list[bool]:
    """Which packets can be left out without changing any other picture: of the highest temporal layer and referred to
    by none of it.
    """
    top = max((p.layer for p in pictures if p), default=0)
    return [p is not None and not p.reference and p.layer == top for p in pictures]
