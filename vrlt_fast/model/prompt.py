"""From a sample and its media to token ids and positions: made once, used by rollout, scoring, reference and update."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.prompts import messages
from vrlt_fast.data.sample import Sample
from vrlt_fast.errors import DataError, Problem, SetupError
from vrlt_fast.model.load import ModelInfo
from vrlt_fast.model.positions import Grid, mrope_positions
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.video.preprocess import Clip

SLOT = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
_SLOTS = re.compile("|".join(map(re.escape, (SLOT, IMAGE_SLOT))))


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, ``asked`` as its configuration says: ``media`` its images and videos in order of appearance, ids
    int64 [L], positions int64 [3, L], ``visual`` the places [n] of the media's tokens in order.
    """

    sample: Sample
    media: tuple[Clip, ...]
    asked: PromptConfig
    text: str
    ids: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    next_position: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def clip(self) -> Clip:
        """The video. Raises ValueError when the prompt has none."""
        for clip in self.media:
            if clip.kind == "video":
                return clip
        raise ValueError(f"the prompt of {self.sample.id} has no video")

    @property
    def media_key(self) -> tuple[str, ...]:
        """Names all that is seen, in order: equal keys, equal patches."""
        return tuple(clip.key for clip in self.media)


class Encoded(NamedTuple):
    """A text with its media laid out; fields as those of :class:`Prompt`."""

    text: str
    ids: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    next_position: int


def read_by_all(prompts: Sequence[Prompt], peers: Peers) -> dict[int, Prompt]:
    """Those that each of the peers has, with the same tokens and grids, by their places. A clip has one key for all of
    them: where a decoder stood in for another in one process, that of clips that may differ.
    """
    if peers.size == 1:
        return dict(enumerate(prompts))
    names = [(p.sample.id, len(p), tuple(clip.grid for clip in p.media)) for p in prompts]
    told = peers.objects([(name, [c.key for c in p.media]) for name, p in zip(names, prompts, strict=True)])
    every = [dict(part) for part in told]
    same: dict[int, Prompt] = {}
    for place, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        if not all(name in part for part in every):
            continue
        keys = [max(found, key=len) for found in zip(*(part[name] for part in every), strict=True)]
        media = tuple(replace(c, key=k) if c.key != k else c for c, k in zip(prompt.media, keys, strict=True))
        same[place] = replace(prompt, media=media) if keys != [c.key for c in prompt.media] else prompt
    return same


def encode_prompt(
    info: ModelInfo,
    sample: Sample,
    clip: Clip | None,
    prompt: PromptConfig,
    *,
    images: Sequence[Clip] = (),
    reserve: int = 0,
) -> Prompt:
    """Render the chat template, lay images and video out in this order and give every token its position.

    Args:
        clip: the video; None: images only.
        images: clips of images, shown whatever ``prompt.images`` says.
        reserve: tokens that must fit behind the prompt (``rollout.max_new_tokens``).

    Raises:
        DataError: D10 when prompt and response exceed the model's context; nothing is ever truncated.
        SetupError: M03 when the chat template leaves no place for what is shown.
        ValueError: neither video nor image.
    """
    media = (*images, clip) if clip is not None else tuple(images)
    if not media:
        raise ValueError(f"nothing to see for {sample.id}")
    text = render(info, sample, prompt, images=len(images), video=clip is not None)
    where, layout = sample.line or sample.id, prompt.video_layout
    encoded = encode_media(info, text, media, layout=layout, reserve=reserve, where=where)
    return Prompt(sample, media, prompt, *encoded)


def encode_media(
    info: ModelInfo,
    text: str,
    media: Sequence[Clip],
    *,
    layout: str = "native",
    reserve: int = 0,
    where: str = "",
) -> Encoded:
    """Fill the slots of a text (``SLOT`` for a video, ``IMAGE_SLOT`` for an image) with media in order.

    Args:
        layout: as ``prompt.video_layout``.
        where: names the prompt in errors.

    Raises:
        DataError: D10 as :func:`encode_prompt`.
        ValueError: slots and media differ in number or kind.
    """
    slots = _SLOTS.findall(text)
    if slots != [IMAGE_SLOT if clip.kind == "image" else SLOT for clip in media]:
        raise ValueError(f"{len(slots)} slots don't fit {len(media)} images and videos")
    laid_out = [_lay_out(info, clip, layout) for clip in media]
    rest = iter(laid_out)
    text = _SLOTS.sub(lambda _: next(rest)[0], text)
    short = torch.tensor(info.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    repeats = torch.ones_like(short)
    repeats[_is_visual(info, short)] = torch.tensor([run for _, runs, _ in laid_out for run in runs])
    ids = short.repeat_interleave(repeats)
    if len(ids) + reserve > info.context:
        videos = sum(clip.n_tokens for clip in media if clip.kind == "video")
        total = sum(clip.n_tokens for clip in media)
        raise DataError(
            Problem(
                "VRLT-D10",
                f"prompt of {len(ids)} tokens and response of {reserve} exceed the model's context of {info.context}",
                where=where,
                why=f"videos have {videos} tokens, images {total - videos}",
                fix="lower video.max_frames, video.max_pixels, video.image_max_pixels or rollout.max_new_tokens",
            )
        )
    return _place(info, text, ids, [(clip, grids) for clip, (_, _, grids) in zip(media, laid_out, strict=True)])


def _lay_out(info: ModelInfo, clip: Clip, layout: str) -> tuple[str, list[int], list[Grid]]:
    """What a clip puts into its slot, the length of each run of visual tokens in it, and the grid of each run.

    Blocks of Qwen3-VL replace the whole slot, as its first release wrote them; transformers from 5.10 on leaves the
    slot's own start and end tokens around them.
    """
    t, h, w = clip.grid
    if clip.kind == "image":
        return IMAGE_SLOT, [clip.n_tokens], [clip.grid]
    if layout == "native" and not info.frame_blocks:
        return SLOT, [clip.n_tokens], [clip.grid]
    blocks = "".join(f"<{seconds:.1f} seconds>{SLOT}" for seconds in clip.grid_times)
    return blocks, [clip.n_tokens // t] * t, [(1, h, w)] * t


def _is_visual(info: ModelInfo, ids: torch.Tensor) -> torch.Tensor:
    """bool [L]: true for tokens that stand for pictures."""
    return (ids == info.video_token) | (ids == info.image_token)


def _place(info: ModelInfo, text: str, ids: torch.Tensor, grids: Sequence[tuple[Clip, Sequence[Grid]]]) -> Encoded:
    """Positions of ids int64 [L] whose runs of visual tokens have these grids."""
    videos = [(grid, clip.seconds_per_grid) for clip, found in grids if clip.kind == "video" for grid in found]
    positions, after = mrope_positions(
        ids,
        [grid for grid, _ in videos],
        [seconds for _, seconds in videos],
        family=info.family,
        video_token=info.video_token,
        merge=info.geometry.merge,
        tokens_per_second=getattr(info.config.vision_config, "tokens_per_second", 1),
        image_grids=[grid for clip, found in grids if clip.kind == "image" for grid in found],
        image_token=info.image_token,
    )
    return Encoded(text, ids, positions, _is_visual(info, ids).nonzero()[:, 0], after)


def render(info: ModelInfo, sample: Sample, prompt: PromptConfig, *, images: int = 0, video: bool = True) -> str:
    """The chat template's text with one slot for each image, then one for the video. Raises SetupError M03."""
    asked = messages(sample, prompt, images=images, video=video)
    text = str(info.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    slots = _SLOTS.findall(text)
    if slots != [IMAGE_SLOT] * images + [SLOT] * video:
        found = f"{slots.count(SLOT)} video and {slots.count(IMAGE_SLOT)} image slots"
        raise SetupError(
            Problem(
                "VRLT-M03",
                f"chat template writes {found} for {int(video)} video and {images} images",
                where=info.path,
                fix="use the chat template of the released vision-language model",
            )
        )
    return text


def encode_narration(info: ModelInfo, sample: Sample, clip: Clip, prompt: PromptConfig) -> tuple[Prompt, torch.Tensor]:
    """The prompt's beginning with a caption behind each frame pair: what ``sample.timeline`` says of that time, or "-".

    Returns the prompt, without the sample's images, and int64 [n] the places of the caption tokens in it. Pieces are
    tokenized one by one, so that a caption never merges with what follows it.

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
    placed = _place(info, head, torch.tensor(ids, dtype=torch.int64), [(clip, [(1, h, w)] * t)])
    return Prompt(sample, (clip,), prompt, *placed), torch.tensor(places, dtype=torch.int64)
