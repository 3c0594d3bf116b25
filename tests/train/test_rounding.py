"""Stochastic rounding to bf16: right in the mean, exact where nothing is to round, the same wherever it is done."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vrlt_fast.train.rounding import noise_, round_to_bf16


def words(n, key):
    return noise_(torch.empty(n, dtype=torch.int32), key)


def test_noise_is_uniform_and_repeats(seed):
    n, key = 2**18, f"{seed} key"
    noise = words(n, key)
    assert torch.equal(noise, words(n, key))
    assert torch.equal(noise[:1000], words(1000, key))
    assert not torch.equal(noise, words(n, f"{seed} other"))
    for half in (noise & 0xFFFF, (noise >> 16) & 0xFFFF):
        counts = torch.bincount(half.long() >> 8, minlength=256).double()
        chi = float(((counts - n / 256).square() / (n / 256)).sum())
        assert abs(chi - 255) < 6 * math.sqrt(2 * 255)
    low, high = (noise & 0xFFFF).double(), ((noise >> 16) & 0xFFFF).double()
    for a, b in ((low, high), (low[1:], low[:-1]), (low, (words(n, f"{seed} other") & 0xFFFF).double())):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 6 / math.sqrt(n)


def test_noise_by_hand():
    """The arithmetic of unsigned words in plain integers."""
    from hashlib import blake2b

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    digest = blake2b(b"7 0 weight 0", digest_size=8).digest()
    first, second = (int.from_bytes(part, "little") for part in (digest[:4], digest[4:]))
    expected = [mix(mix(i ^ first) ^ second) for i in range(1000)]
    assert [w % 2**32 for w in words(1000, "7 0 weight 0").tolist()] == expected


def test_rounding_keeps_the_expectation(seed):
    rng, n = random.Random(seed), 2**17
    for _ in range(20):
        value = rng.choice([-1, 1]) * rng.uniform(1, 2) * 2.0 ** rng.randint(-126, 120)
        exact = torch.full((n,), value, dtype=torch.float32)
        out = round_to_bf16(exact, words(n, f"{seed} {value}") & 0xFFFF)
        low, high = sorted(set(out.tolist()))[0], sorted(set(out.tolist()))[-1]
        target = float(exact[0])
        assert low <= target <= high
        assert high - low <= 2.0**-7 * abs(target)
        assert abs(float(out.double().mean()) - target) <= 6 * (high - low) / math.sqrt(n)


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, 1.0, -2.5, 2.0**-130])
def test_what_bf16_has_stays(value, seed):
    exact = torch.full((4096,), value)
    out = round_to_bf16(exact, words(4096, str(seed)) & 0xFFFF)
    assert torch.equal(out.view(torch.int16), exact.to(torch.bfloat16).view(torch.int16))


def test_nan_stays_and_nothing_is_nothing():
    assert bool(round_to_bf16(torch.full((64,), math.nan), words(64, "nan") & 0xFFFF).isnan().all())
    assert round_to_bf16(torch.zeros(0), words(0, "")).shape == (0,)


def test_noise_of_a_part_is_that_of_the_whole(seed):
    key = f"{seed} part"
    part = noise_(torch.empty(100, dtype=torch.int32), key, 37)
    assert torch.equal(part, words(200, key)[37:137])
