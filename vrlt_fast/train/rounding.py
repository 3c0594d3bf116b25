"""fp32 to bf16 by stochastic rounding, with random numbers that are a function of where they are used.

A number between two neighbours in bf16 becomes the upper one with the probability of its place between them, so that
its expectation stays. Rounded to the nearest, a mean that moves by less than half of 2^-8 of itself would never move.
"""

from __future__ import annotations

from hashlib import blake2b

import torch


def noise_(words: torch.Tensor, key: str, first: int = 0) -> torch.Tensor:
    """Fill int32 [n] with 32 random bits each: a hash of ``key`` and of the place, from ``first`` on. The same on every
    device.
    """
    torch.arange(first, first + len(words), out=words)
    digest = blake2b(key.encode(), digest_size=8).digest()
    for part in (digest[:4], digest[4:]):
        words ^= int.from_bytes(part, "little", signed=True)
        _mix_(words)
    return words


def _mix_(x: torch.Tensor) -> None:
    """A bijection of 32 bits in which every bit decides on every other (Wellons' lowbias32)."""
    x ^= (x >> 16) & 0xFFFF  # >> keeps the sign
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF


def round_to_bf16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 [n] to bf16 [n], up or down in magnitude. Numbers of bf16, zeros and infinities stay as they are.

    Args:
        noise: int32 [n], uniform in 0 .. 2^16 - 1.
    """
    # sign and magnitude: adding to the 16 bits that go carries into the others with the probability of their share
    bits = (values.view(torch.int32) + noise).bitwise_and_(-(2**16))
    return bits.view(torch.float32).to(torch.bfloat16)
