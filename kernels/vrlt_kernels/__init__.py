"""Kernels for group-relative policy optimisation. This version holds the reference mathematics in plain PyTorch."""

from .group_advantage import group_advantages_ref
from .policy_coef import PolicyLoss, policy_loss_ref
from .token_logprob import token_logprob_ref

__all__ = ["PolicyLoss", "group_advantages_ref", "policy_loss_ref", "token_logprob_ref"]
