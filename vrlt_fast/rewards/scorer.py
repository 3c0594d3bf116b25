"""A small model in process that scores an answer against a reference: any HF sequence classifier of text pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from vrlt_fast.config_rl import ScorerConfig
from vrlt_fast.errors import ConfigError, Problem, SetupError

LOG = logging.getLogger("vrlt_fast")
_UNBOUNDED = 1 << 20
"""Tokenizers that don't know the model's length say a very large number."""


class Scorer:
    """Scores pairs in 0..1 with a classifier in fp32 on ``device``: the sigmoid of its output where it has one label,
    else the softmax probability of its last label. VideoHallu (github.com/zli12321/VideoHallu) trains with a small
    model of this kind.

    Args:
        batch: pairs in one pass.
        warn: called once, when an output isn't a number.

    ``counts["nan"]`` says how many pairs scored 0 because the output wasn't a number.

    Raises:
        ConfigError: C04 without ``scorer.model``.
        SetupError: M01 no such folder, or without safetensors weights; M03 its tokenizer can't be read or has no
            padding token; M04 weights missing (those of the classifier's head, say), left over or damaged.
    """

    def __init__(
        self,
        config: ScorerConfig,
        device: torch.device,
        *,
        batch: int = 64,
        warn: Callable[[str], None] = LOG.warning,
    ):
        if not config.model:
            what = 'scorer.model is empty, but reward.open = "scorer" needs it'
            fix = 'set scorer.model to the folder of an HF sequence classifier, or reward.open = "rouge"'
            raise ConfigError(Problem("VRLT-C04", what, "scorer.model", fix=fix))
        self.device, self.batch, self.counts = device, batch, {"nan": 0}
        self._warn, self._warned = warn, False
        self._tokenizer = _tokenizer(config.model)
        self._model = _model(config.model).to(device).eval().requires_grad_(False)
        if self._model.config.pad_token_id is None:
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        longest = self._tokenizer.model_max_length
        if longest > _UNBOUNDED:
            longest = getattr(self._model.config, "max_position_embeddings", None) or config.max_length
        self.max_length = min(config.max_length, longest)

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """A score for each pair of reference and candidate. The longer of the two texts is cut where both have more
        than ``max_length`` tokens. Equal pairs are scored once; a pair's score depends on no other but for rounding.
        """
        if not pairs:
            return []
        different = list(dict.fromkeys(pairs))
        ids = self._tokenizer(
            [_clean(reference) for reference, _ in different],
            [_clean(candidate) for _, candidate in different],
            truncation="longest_first",
            max_length=self.max_length,
        )
        lengths = [len(one) for one in ids["input_ids"]]
        order = sorted(range(len(different)), key=lengths.__getitem__)
        scores: dict[tuple[str, str], float] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            part = {name: [values[i] for i in chosen] for name, values in ids.items()}
            inputs = self._tokenizer.pad(part, return_tensors="pt").to(self.device)
            found = in_0_1(self._model(**inputs).logits.float()).tolist()
            scores |= dict(zip((different[i] for i in chosen), found, strict=True))
        return [self._checked(scores[pair]) for pair in pairs]

    def _checked(self, value: float) -> float:
        if math.isfinite(value):
            return value
        self.counts["nan"] += 1
        if not self._warned:
            self._warned = True
            self._warn("scorer.model: an output isn't a number; such answers earn 0 (said once)")
        return 0.0


def in_0_1(logits: torch.Tensor) -> torch.Tensor:
    """Scores [n] of logits [n, labels]: sigmoid of one label, or probability of the last of several."""
    return torch.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else torch.softmax(logits, dim=-1)[:, -1]


def _clean(text: str) -> str:
    """Without lone surrogates, which tokenizers refuse."""
    return text.encode("utf-8", "replace").decode()


def _problem(code: str, what: str, where: str, why: str = "", fix: str = "") -> SetupError:
    return SetupError(Problem(code, what, where, why, fix))


def _tokenizer(name: str) -> Any:
    folder = Path(name)
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "safetensors weights")):
        if not list(folder.glob(pattern)):
            fix = "point scorer.model at a folder that was saved with save_pretrained"
            raise _problem("VRLT-M01", f"the scorer's folder has no {what}", name, fix=fix)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _problem("VRLT-M03", "the scorer's tokenizer can't be read", name, str(error).splitlines()[0]) from None
    if tokenizer.pad_token_id is None:
        raise _problem("VRLT-M03", "the scorer's tokenizer has no padding token", name, fix="set one and save it again")
    return tokenizer


def _model(name: str) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _problem("VRLT-M04", "the scorer can't be loaded", name, str(error).splitlines()[0]) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            first = sorted(map(str, loading[kind]))[0]
            what = f"{len(loading[kind])} {kind.replace('_', ' ')}, first {first}"
            raise _problem("VRLT-M04", what, name, "the weights aren't those of a sequence classifier of this kind")
    return model
