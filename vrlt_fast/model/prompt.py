"""From a sample and its clip to token ids and positions: made once, used by rollout, scoring, reference and update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.prompts import messages
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import DataError, Problem, SetupError
from vrlt_fast.model.load import ModelInfo
from vrlt_fast.model.positions import Grid, mrope_positions
from vrlt_fast.video.preprocess import Clip

SLOT = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, ``asked`` as its configuration says: ids int64 [L], positions int64 [3, L], ``visual`` the places
    [n] of the clip's tokens in order.
    """

    sample: Sample
    clip: Clip
    asked: PromptConfig
    text: str
    ids: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    next_position: int

    def __len__(self) -> int:
        return len(self.ids)


def encode_prompt(info: ModelInfo, sample: Sample, clip: Clip, prompt: PromptConfig, *, reserve: int = 0) -> Prompt:
    """Render the chat template, lay the video out and give every token its position.

    Args:
        reserve: tokens that must fit behind the prompt (``rollout.max_new_tokens``).

    Raises:
        DataError: D10 when prompt and response exceed the model's context; nothing is ever truncated.
        SetupError: M03 when the chat template leaves no place for a video.
    """
    (t, h, w), per_grid = clip.grid, clip.n_tokens // clip.grid[0]
    grids: list[Grid]
    if prompt.video_layout == "native":
        blocks, grids = SLOT, [(t, h, w)]
        runs = [clip.n_tokens]
    else:
        blocks = "".join(f"<{seconds:.1f} seconds>{SLOT}" for seconds in clip.grid_times)
        grids, runs = [(1, h, w)] * t, [per_grid] * t
    rendered = render(info, sample, prompt)
    text = rendered.replace(SLOT, blocks)
    short = torch.tensor(info.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    repeats = torch.ones_like(short)
    repeats[short == info.video_token] = torch.tensor(runs)
    ids = short.repeat_interleave(repeats)
    if len(ids) + reserve > info.context:
        raise DataError(
            Problem(
                "VRLT-D10",
                f"prompt of {len(ids)} tokens and response of {reserve} exceed the model's context of {info.context}",
                where=sample.line or sample.id,
                why=f"the video alone has {clip.n_tokens} tokens",
                fix="lower video.max_frames, video.max_pixels or rollout.max_new_tokens",
            )
        )
    positions, after = mrope_positions(
        ids,
        grids,
        [clip.seconds_per_grid] * len(grids),
        family=info.family,
        video_token=info.video_token,
        merge=info.geometry.merge,
        tokens_per_second=getattr(info.config.vision_config, "tokens_per_second", 1),
    )
    visual = (ids == info.video_token).nonzero()[:, 0]
    return Prompt(sample, clip, prompt, text, ids, positions, visual, after)


def render(info: ModelInfo, sample: Sample, prompt: PromptConfig) -> str:
    """The chat template's text with exactly one video slot. Raises SetupError M03."""
    text = info.tokenizer.apply_chat_template(messages(sample, prompt), tokenize=False, add_generation_prompt=True)
    if text.count(SLOT) != 1:
        raise SetupError(
            Problem(
                "VRLT-M03",
                f"chat template writes {text.count(SLOT)} video slots for one video",
                where=info.path,
                fix="use the chat template of the released vision-language model",
            )
        )
    return str(text)
