"""Kernels for group-relative policy optimisation: advantages, log-probs, losses, forward and backward.

Every operator has a plain PyTorch reference beside it (``*_ref``). Imports need torch only; Triton is imported by the
first operator that runs on it.
"""

from ._checks import KernelInputError
from ._launch import availability, report, use_backend
from .group_advantage import group_advantages, group_advantages_ref
from .group_attention import (
    GroupSpans,
    chunk_attention,
    chunk_attention_ref,
    group_attention,
    group_attention_ref,
)
from .group_decode import group_decode, group_decode_ref
from .grpo_loss import GrpoLoss, grpo_loss, grpo_loss_ref
from .layers import rms_norm, rms_norm_ref, swiglu, swiglu_ref
from .linear_grpo_loss import linear_grpo_loss, linear_grpo_loss_ref
from .linear_logprob import linear_logprob, linear_logprob_ref
from .linear_token_weight import linear_token_weight, linear_token_weight_ref
from .loss_spec import LossSpec
from .padded import padded_grpo_loss, padded_linear_grpo_loss
from .patchify import NV12, patchify, patchify_into, patchify_ref
from .policy_coef import PolicyCoef, PolicyLoss, policy_coef, policy_coef_ref, policy_loss, policy_loss_ref
from .token_logprob import TokenLogprob, token_logprob, token_logprob_ref
from .token_weight import token_weight, token_weight_ref

__all__ = [
    "NV12",
    "GroupSpans",
    "GrpoLoss",
    "KernelInputError",
    "LossSpec",
    "PolicyCoef",
    "PolicyLoss",
    "TokenLogprob",
    "availability",
    "chunk_attention",
    "chunk_attention_ref",
    "group_advantages",
    "group_advantages_ref",
    "group_attention",
    "group_attention_ref",
    "group_decode",
    "group_decode_ref",
    "grpo_loss",
    "grpo_loss_ref",
    "linear_grpo_loss",
    "linear_grpo_loss_ref",
    "linear_logprob",
    "linear_logprob_ref",
    "linear_token_weight",
    "linear_token_weight_ref",
    "padded_grpo_loss",
    "padded_linear_grpo_loss",
    "patchify",
    "patchify_into",
    "patchify_ref",
    "policy_coef",
    "policy_coef_ref",
    "policy_loss",
    "policy_loss_ref",
    "report",
    "rms_norm",
    "rms_norm_ref",
    "swiglu",
    "swiglu_ref",
    "token_logprob",
    "token_logprob_ref",
    "token_weight",
    "token_weight_ref",
    "use_backend",
]
