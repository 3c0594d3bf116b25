"""Steps whose loss or gradient isn't finite: not applied, written down, and after three in a row the end of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from vrlt_fast.errors import Problem, Stopped
from vrlt_fast.files import storage_errors, write_atomic, write_text
from vrlt_fast.model.prompt import Prompt

IN_A_ROW = 3
MOST_BYTES = 64 * 10**6

Batch = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
"""Tensors by name, and what belongs to each prompt, for JSON."""


class Guard:
    """``folder``: where the batches of bad steps go. ``warn``: called with one line for each. ``of``: ends the names of
    its files, where several processes write their shares. ``writes``: False where another process has the same batch,
    and writes it.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None], of: str = "", *, writes: bool = True):
        self._folder, self._warn, self._of, self._writes = folder, warn, of, writes
        self.in_a_row = 0
        """Bad steps up to now, for the checkpoint."""

    def look(self, stage: str, step: int, loss: float, norm: float, batch: Callable[[], Batch]) -> bool:
        """Whether the step was finite; ``batch`` is asked for where it wasn't.

        Raises:
            Stopped: S01 the third in a row that isn't.
            SetupError: R02 or R03 the batch can't be written.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        name = f"{stage}-{step:06d}{self._of}"
        if self._writes:
            self._write(name, {"stage": stage, "step": step, "loss": repr(loss), "grad_norm": repr(norm)}, batch())
        what = f"loss {loss} with gradient norm {norm}"
        self._warn(f"step {step} of {stage} skipped: {what}; its batch: {self._folder / name}.json")
        if self.in_a_row >= IN_A_ROW:
            why = f"{IN_A_ROW} steps in a row; no update that wasn't finite was applied"
            fix = "start a new run with a lower learning rate, with --model.name at this run's newest checkpoint"
            raise Stopped(Problem("VRLT-S01", what, str(self._folder / f"{name}.json"), why, fix))
        return False

    def _write(self, name: str, text: dict[str, Any], batch: Batch) -> None:
        tensors, about = batch
        kept = _within(tensors, MOST_BYTES)
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / f"{name}.safetensors", [save(kept)])
        left = {"left_out": sorted(tensors.keys() - kept.keys())} if len(kept) < len(tensors) else {}
        write_text(self._folder / f"{name}.json", json.dumps({**text, **left, "prompts": about}, indent=1) + "\n")


def describe_prompts(prompts: Sequence[Prompt], responses: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
    """A batch of prompts with their responses; ``tokens`` (and ``logprobs``) of a response become tensors."""
    tensors: dict[str, torch.Tensor] = {}
    about = []
    for p, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        tensors[f"{p}.ids"] = prompt.ids.to(torch.int32)
        tensors[f"{p}.positions"] = prompt.positions.to(torch.int32).contiguous()
        sample = prompt.sample
        listed = []
        for r, response in enumerate(group):
            tensors[f"{p}.{r}.tokens"] = torch.tensor(list(response["tokens"]), dtype=torch.int32)
            if "logprobs" in response:
                tensors[f"{p}.{r}.logprobs"] = response["logprobs"].float()
            listed.append({k: v for k, v in response.items() if k not in ("tokens", "logprobs")})
        media = [{"key": clip.key, "times": list(clip.times)} for clip in prompt.media]
        about.append(
            {"id": sample.id, "video": sample.video, "where": sample.line, "media": media, "responses": listed}
        )
    return tensors, about


def _within(tensors: Mapping[str, torch.Tensor], most: int) -> dict[str, torch.Tensor]:
    """The first tensors that fit."""
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        most -= tensor.nbytes + 256
        if most < 0:
            break
        kept[name] = tensor
    return kept
