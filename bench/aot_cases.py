"""Calls that launch every Triton kernel of vrlt_kernels, with the shapes and types of real use: see ``bench.aot``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

VOCAB = 152064  # Qwen2.5-VL-7B
Case = tuple[str, Callable[[], object]]


def cases() -> Iterator[Case]:
    """Label and call. The tensors are on the CPU; what the calls return means nothing."""
    yield from _rows()
    yield from _token_weight()
    yield from _advantages()
    yield from _policies()
    yield from _patches()
    yield from _decodes()
    yield from _attentions()


def _logits(dtype: torch.dtype, rows: int = 8, vocab: int = VOCAB) -> torch.Tensor:
    return torch.zeros(rows, vocab, dtype=dtype)


def _rows() -> Iterator[Case]:
    from vrlt_kernels import _rows as op

    target = torch.zeros(8, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x, one = _logits(dtype), torch.ones(8, dtype=torch.promote_types(dtype, torch.float32))
        given = (x, target, one[:1])
        stats: dict[str, Any] = {"lse": one, "entropy": one, "a": one}
        label = str(dtype).removeprefix("torch.")
        yield label, partial(op.row_stats, *given, False)
        yield f"{label}, sum p^2, T per row", partial(op.row_stats, x, target, one, True)
        yield label, partial(op.row_fused_, *given)
        yield label, partial(op.row_grad_, x, *given, **stats, e=None)
        yield f"{label}, entropy", partial(op.row_grad_, x, *given, **stats, e=one)
        yield label, partial(op.row_mix_, x, *given, logp=one, entropy=one, a=one, e=one)


def _token_weight() -> Iterator[Case]:
    from vrlt_kernels.token_weight import token_weight

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, lse = _logits(dtype), torch.ones(8, dtype=torch.promote_types(dtype, torch.float32))
        label = str(dtype).removeprefix("torch.")
        yield label, partial(token_weight, x, torch.arange(0, 9, 2), 4, lse=lse)


def _advantages() -> Iterator[Case]:
    from vrlt_kernels.group_advantage import SCALES, group_advantages

    for dtype in (torch.float32, torch.float64):
        rewards = torch.zeros(64, dtype=dtype)
        label = str(dtype).removeprefix("torch.")
        for scale in SCALES:
            lengths = torch.ones(64, dtype=torch.int64) if scale == "opo" else None
            yield f"{label}, {scale}", partial(group_advantages, rewards, 8, scale=scale, lengths=lengths)
        offsets = torch.arange(0, 65, 8)
        yield f"{label}, raw, offsets", partial(group_advantages, rewards, offsets, singleton="raw")


def _policies() -> Iterator[Case]:
    """Every policy as it is mostly used, and once with everything that can be switched on."""
    from vrlt_kernels.group_advantage import SCALES
    from vrlt_kernels.loss_spec import CORRECTION_LEVELS, KL_WEIGHTS, KLS, POLICIES, LossSpec
    from vrlt_kernels.policy_coef import policy_coef

    cu, logp, rewards = torch.arange(0, 65, 8), torch.zeros(64), torch.zeros(8)
    names = ("old_logp", "ref_logp", "rollout_logp", "entropy", "token_weight")
    extras = dict.fromkeys(names, logp) | {"mask": torch.ones(64, dtype=torch.bool)}
    corrections = ("tis", "mis", "reject")
    for i, policy in enumerate(POLICIES):
        spec = LossSpec(policy=policy)
        yield policy, partial(policy_coef, logp, cu, spec, advantages=rewards, old_logp=logp, groups=4)
        full = LossSpec(
            policy=policy, kl=KLS[1 + i % 6], kl_weight=KL_WEIGHTS[i % 3], beta=0.1, gate_delta=0.1, entropy_coef=0.1,
            correction=corrections[i % 3], correction_level=CORRECTION_LEVELS[i // 3 % 3],
        )  # fmt: skip
        given: dict[str, Any] = {"groups": 4, **extras}
        given |= {"advantages": rewards} if policy == "reg" else {"rewards": rewards, "adv_scale": SCALES[i % 4]}
        yield f"{policy}, all", partial(policy_coef, logp, cu, full, **given)
    double, spec = logp.double(), LossSpec(policy="gspo", kl="k3", beta=0.1, kl_weight="sequence")
    per_token: dict[str, Any] = {"advantages": double, "old_logp": double, "ref_logp": double}
    yield "gspo, float64", partial(policy_coef, double, cu, spec, **per_token)


def _patches() -> Iterator[Case]:
    """Both towers' geometries, both routes, all sources and results."""
    from vrlt_kernels.patchify import NV12, patchify

    rgb = torch.zeros(2, 108, 192, 3, dtype=torch.uint8)
    nv12 = NV12(rgb[..., 0], torch.zeros(2, 54, 96, 2, dtype=torch.uint8))
    norm: dict[str, Any] = {"normalize": ((0.5,) * 3, (0.5,) * 3), "dtype": torch.bfloat16}
    for patch in (14, 16):
        size = (4 * patch, 6 * patch)
        for resample in ("native", "float"):
            common = partial(patchify, size=size, patch=patch, resample=resample)
            yield f"{patch}, {resample}", partial(common, rgb)
            yield f"{patch}, {resample}, nv12, normalised", partial(common, nv12, **norm)
    size = (84, 56)
    yield "14, turned, float32", partial(patchify, rgb, size, rotation=90, normalize=norm["normalize"])
    yield "14, nv12, turned", partial(patchify, nv12, size, rotation=270)
    yield "14, upside down", partial(patchify, rgb, (56, 84), rotation=180)


def _decodes() -> Iterator[Case]:
    """Query heads, KV heads and head dimensions of real models, with groups that make small tiles and large ones."""
    from vrlt_kernels.group_decode import group_decode

    half = ((28, 4, 128, 8), (28, 4, 128, 16), (16, 8, 128, 8), (16, 8, 128, 16), (12, 2, 64, 8), (16, 16, 80, 8),
            (8, 4, 256, 16))  # fmt: skip
    wanted = [(torch.bfloat16, *heads) for heads in half]
    wanted += [(torch.float16, *half[0]), (torch.float32, *half[0]), (torch.float32, 6, 2, 16, 8)]
    for dtype, queries, shared, dim, rows in wanted:
        prefix, suffix = (torch.zeros(*size, shared, dim, dtype=dtype) for size in ((4096,), (rows, 1024)))
        ints = torch.zeros(rows, dtype=torch.int64)
        layout: dict[str, Any] = {
            "slots": ints,
            "suffix_length": ints,
            "row_offsets": torch.tensor([0, rows], dtype=torch.int32),
        }
        layout |= {"prefix_start": ints[:1], "prefix_length": ints[:1]}
        query = torch.zeros(rows, queries, dim, dtype=dtype)
        label = f"{str(dtype).removeprefix('torch.')}, {queries}/{shared} heads of {dim}, {rows} rows"
        yield label, partial(group_decode, query, prefix, prefix, suffix, suffix, **layout)


def _attentions() -> Iterator[Case]:
    """Forward and backward of a group; rows behind a prefix that was computed before launch the same kernels."""
    from vrlt_kernels.group_attention import GroupSpans, group_attention

    spans = GroupSpans.of([256], [[100, 70]])
    wanted = [(torch.bfloat16, 28, 4, 128), (torch.bfloat16, 16, 16, 80), (torch.bfloat16, 8, 4, 256),
              (torch.float32, 28, 4, 128)]  # fmt: skip

    def run(query: torch.Tensor, keys: torch.Tensor) -> None:
        out = group_attention(query, keys, keys, spans)
        torch.autograd.backward(out, torch.zeros_like(out))

    for dtype, queries, shared, dim in wanted:
        keys = torch.zeros(spans.tokens, shared, dim, dtype=dtype, requires_grad=True)
        query = torch.zeros(spans.tokens, queries, dim, dtype=dtype, requires_grad=True)
        label = f"{str(dtype).removeprefix('torch.')}, {queries}/{shared} heads of {dim}"
        yield label, partial(run, query, keys)
