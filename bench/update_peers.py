"""Other projects' ways to compute the gradient of :mod:`bench.update_arms`, on the same rows of the same model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from bench.update_arms import GRPO, PACKED, REPLICATED, STAGED, STRONG, Shape, arm
from vrlt_fast.model.language import make_inputs, run_text, score_hidden
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import StepVision, shared_vision
from vrlt_fast.train.passes import group_layout
from vrlt_fast.train.scored import ScoredGroup, StepSize
from vrlt_fast.train.step import UpdateStats
from vrlt_kernels import LossSpec, policy_loss

PREFIX_GROUPER, TRL = "PrefixGrouper", "TRL"
TUNED = (STRONG, TRL)
"""Arms that are measured at their best number of rows."""
_NEEDS = {PREFIX_GROUPER: ("prefix_grouper",), TRL: ("trl", "datasets")}


def arms_of(shape: Shape) -> tuple[list[str], dict[str, str]]:
    """Arms of a cell in order, and why others can't run here."""
    wanted = (PACKED, TRL, REPLICATED) if shape.text else (PACKED, STAGED, STRONG, PREFIX_GROUPER, REPLICATED)
    missing = {name: [m for m in _NEEDS.get(name, ()) if not find_spec(m)] for name in wanted}
    left = {name: f"{' and '.join(lack)} not installed" for name, lack in missing.items() if lack}
    return [name for name in wanted if name not in left], left


def any_arm(name: str, lm: VideoLM, scored: Sequence[ScoredGroup], rows: int = 1) -> Callable[[], UpdateStats]:
    """As :func:`bench.update_arms.arm`, with two more.

    ``PrefixGrouper``: its attention in place of ours, groups one by one, the tower once a clip. ``TRL``: GRPOTrainer's
    loss and its gradient, ``rows`` padded rows at a time; prompts without media only.
    """
    if name == PREFIX_GROUPER:
        return _prefix_grouper(lm, scored)
    return _trl(lm, scored, rows) if name == TRL else arm(name, lm, scored, rows)


class _GrouperPass:
    """PrefixGrouper's attention over one packed group: its prompt, and rows behind copies of the prompt's keys and
    values. sdpa, as the attention that the package is given.
    """

    def __init__(self, grouper: Any):
        self._grouper = grouper

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        out: torch.Tensor = self._grouper.forward(self._attend, *heads_first, scale)[0]
        return out

    @staticmethod
    def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        """One group has no padding but behind its rows, which causality hides: the mask isn't needed."""
        bias = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True).transpose(1, 2)


def _prefix_grouper(lm: VideoLM, scored: Sequence[ScoredGroup]) -> Callable[[], UpdateStats]:
    make = import_module("prefix_grouper").PrefixGrouper
    size, spec = StepSize.of(scored), LossSpec(reduction="dapo", clip_low=GRPO.clip_low, clip_high=GRPO.clip_high)

    def run() -> UpdateStats:
        total, held = UpdateStats(tokens=size.tokens), StepVision(lm)
        for group in scored:
            layout, prompt = group_layout(lm, [group]), group.group.request.prompt
            grouper = make([[layout.spans.prefix[0], *layout.spans.rows[0]]], device=lm.device)
            vision = shared_vision(lm, [prompt], held)
            inputs = make_inputs(lm, layout.ids, layout.positions, layout.visual, vision)
            hidden = run_text(lm, inputs, _GrouperPass(grouper)).index_select(0, layout.source)
            out = policy_loss(
                score_hidden(lm, hidden, layout.targets, 1.0).logp,
                layout.target_offsets,
                spec,
                advantages=torch.tensor([group.advantages[i] for i in group.trained], device=lm.device),
                normalizer=size.tokens,
            )
            torch.autograd.backward(out.loss)
            total.loss += float(out.loss.detach())
            total.tokens_trained += layout.tokens_trained
        held.backward()
        return total

    return run


def _trl(lm: VideoLM, scored: Sequence[ScoredGroup], rows: int) -> Callable[[], UpdateStats]:
    trainer, size = _trl_trainer(lm), StepSize.of(scored)
    batches = _padded(lm, scored, rows)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation

    def run() -> UpdateStats:
        total = UpdateStats(tokens=size.tokens)
        for batch in batches:
            loss = trainer._compute_loss(trainer.model, batch)
            torch.autograd.backward(loss)
            total.loss += float(loss.detach())
            total.tokens_trained += batch["prompt_ids"].numel() + batch["completion_ids"].numel()
        for metrics in trainer._metrics.values():
            metrics.clear()
        return total

    return run


def _trl_trainer(lm: VideoLM) -> Any:
    """TRL's trainer around the model itself, checkpointing left as it is: a mean over all tokens, no KL."""
    trl, datasets = import_module("trl"), import_module("datasets")
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            loss_type="dapo",
            beta=0.0,
            epsilon=GRPO.clip_low,
            epsilon_high=GRPO.clip_high,
            temperature=1.0,
            num_generations=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=lm.device.type == "cpu",
            report_to="none",
        )
        return trl.GRPOTrainer(
            model=lm.module,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=lm.info.tokenizer,
        )


def _padded(lm: VideoLM, scored: Sequence[ScoredGroup], rows: int) -> list[dict[str, torch.Tensor]]:
    """What TRL makes of the rows: prompts padded on the left, responses on the right, to the step's longest."""
    rows_of = [(s.group, s.advantages[i], i) for s in scored for i in s.trained]
    flat = [(g.request.prompt.ids, g.completions[i].tokens, advantage) for g, advantage, i in rows_of]
    before, after = max(len(p) for p, _, _ in flat), max(len(t) for _, t, _ in flat)
    pad = lm.info.pad_token
    columns = {
        "prompt_ids": [F.pad(p, (before - len(p), 0), value=pad) for p, _, _ in flat],
        "prompt_mask": [(torch.arange(before) >= before - len(p)).long() for p, _, _ in flat],
        "completion_ids": [F.pad(torch.tensor(t), (0, after - len(t)), value=pad) for _, t, _ in flat],
        "completion_mask": [(torch.arange(after) < len(t)).long() for _, t, _ in flat],
        "advantages": [torch.tensor(a) for _, _, a in flat],
    }
    whole = {name: torch.stack(column).to(lm.device) for name, column in columns.items()}
    count = torch.tensor(sum(len(t) for _, t, _ in flat), device=lm.device)
    parts = range(0, len(flat), rows)
    return [{n: x[i : i + rows] for n, x in whole.items()} | {"num_items_in_batch": count} for i in parts]
