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


def encode_narration(info: ModelInfo, sample: Sample, clip: Clip, prompt: PromptConfig) -> tuple[Prompt, torch.Tensor]:
    """The prompt's beginning with a caption behind each frame pair: what ``sample.timeline`` says of that time, or "-".

    Returns the prompt, and int64 [n] the places of the caption tokens in it. Pieces are tokenized one by one, so that a
    caption never merges with what follows it.

    Raises:
        DataError: D10 as :func:`encode_prompt`.
    """
    head = render(info, sample, prompt).split(SLOT)[0]
    ids: list[int] = []
    places: list[int] = []

    def write(text: str, *, target: bool = False) -> None:
        tokens = info.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = [t for token in tokens for t in ([token] * per_grid if token == info.video_token else [token])]
        places.extend(range(len(ids), len(ids) + len(tokens)) if target else ())
        ids.extend(tokens)

    (t, h, w), per_grid = clip.grid, clip.n_tokens // clip.grid[0]
    write(head)
    for seconds in clip.grid_times:
        seen = [f" {m.text}" for m in sample.timeline if m.start <= seconds < m.end]
        write(f"<{seconds:.1f} seconds>{SLOT}")
        write(",".join(seen) or "-", target=True)
    if len(ids) > info.context:
        what = f"narration of {len(ids)} tokens exceeds the model's context of {info.context}"
        raise DataError(Problem("VRLT-D10", what, sample.line or sample.id, fix="lower video.max_frames"))
    tensor = torch.tensor(ids, dtype=torch.int64)
    positions, after = mrope_positions(
        tensor,
        [(1, h, w)] * t,
        [clip.seconds_per_grid] * t,
        family=info.family,
        video_token=info.video_token,
        merge=info.geometry.merge,
        tokens_per_second=getattr(info.config.vision_config, "tokens_per_second", 1),
    )
    visual = (tensor == info.video_token).nonzero()[:, 0]
    narration = Prompt(sample, clip, prompt, head, tensor, positions, visual, after)
    return narration, torch.tensor(places, dtype=torch.int64)
