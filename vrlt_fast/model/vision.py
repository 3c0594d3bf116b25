"""The vision tower over clips: uint8 patches to embeddings, once a clip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vrlt_fast.model.embed_cache import EmbeddingCache
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.patch_embed import FoldedPatchEmbed
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.parallel.sequence import Peers
from vrlt_fast.video.preprocess import Clip
from vrlt_fast.video.sampling import TUBELET
from vrlt_fast.video.share import Cuts, even_cuts

PIECE = {"cpu": 4096}
"""Patches that go through the tower at a time, by device: what a CPU's caches like."""


@dataclass(frozen=True, eq=False)
class VisionEmbeds:
    """What the language model gets of n visual tokens: ``embeds`` [n, hidden] in place of token embeddings, and of a
    tower with deepstack layers ``deepstack``, each [n, hidden], added to the outputs of the first layers in order.
    """

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, ``embeds`` first."""
        return (self.embeds, *self.deepstack)

    @property
    def requires_grad(self) -> bool:
        """Whether a trained tower made them."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def split(self, sizes: Sequence[int]) -> list[VisionEmbeds]:
        """Pieces of ``sizes`` tokens, views of these."""
        pieces = zip(*(tensor.split(list(sizes)) for tensor in self.tensors), strict=True)
        return [VisionEmbeds(embeds, tuple(deepstack)) for embeds, *deepstack in pieces]


def concat(pieces: Sequence[VisionEmbeds]) -> VisionEmbeds:
    """The tokens of all pieces in order; at least one, all of one tower."""
    embeds, *deepstack = (torch.cat(tensors) for tensors in zip(*(p.tensors for p in pieces), strict=True))
    return VisionEmbeds(embeds, tuple(deepstack))


Pictures = tuple[torch.Tensor, tuple[int, int, int]]
"""Patches [t * h * w, ...] of frame pairs, and their grid (t, h, w)."""


def encode_clips(lm: VideoLM, clips: Sequence[Clip], peers: Peers | None = None) -> VisionEmbeds:
    """The sum of n_tokens tokens of the clips (videos and images), in order; with gradients where the tower is trained.

    A frozen tower runs without a graph. Frame pairs don't see each other in these towers, so they go through in pieces,
    and without a graph what lives inside the tower doesn't grow with the clip.

    Args:
        peers: processes with the same clips, each of which encodes its share of the frame pairs; all get all tokens.
    """
    if peers is None or peers.size == 1:
        if any(clip.cuts for clip in clips):
            raise ValueError("a clip that processes share, encoded by one of them")
        return _encode_all(lm, [(clip.patches, clip.grid) for clip in clips])
    cuts = [_cuts(clip, place, peers.size) for place, clip in enumerate(clips)]
    own = [_own(clip, each, peers.rank) for clip, each in zip(clips, cuts, strict=True)]
    own = [picture for picture in own if picture[1][0]]
    mine = _encode_all(lm, own) if own else _nothing(lm)
    # tokens of each clip by process
    tokens = [
        [(b - a) * clip.n_tokens // clip.grid[0] for a, b in pairwise(c)] for clip, c in zip(clips, cuts, strict=True)
    ]
    counts = [sum(of) for of in zip(*tokens, strict=True)]
    order = _by_clip(tokens).to(lm.device)
    made = (peers.gather(tensor, counts, "visual tokens").index_select(0, order) for tensor in mine.tensors)
    embeds, *deepstack = made
    return VisionEmbeds(embeds, tuple(deepstack))


def _encode_all(lm: VideoLM, pictures: Sequence[Pictures]) -> VisionEmbeds:
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(lm)):
        return concat([_encode(lm, piece) for piece in _pieces(pictures, PIECE.get(lm.device.type, 65536))])


def _cuts(clip: Clip, place: int, size: int) -> Cuts:
    """Of a clip that all have whole, an even share each; images take turns by their place in the batch."""
    if clip.cuts:
        return clip.cuts
    pairs = clip.grid[0]
    return even_cuts(pairs, size) if pairs > 1 else (0,) * (place % size + 1) + (1,) * (size - place % size)


def _own(clip: Clip, cuts: Cuts, rank: int) -> Pictures:
    """This process's frame pairs."""
    (_, h, w), (low, high) = clip.grid, cuts[rank : rank + 2]
    patches = clip.patches if clip.cuts else clip.patches[low * h * w : high * h * w]
    return patches, (high - low, h, w)


def _by_clip(tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64: from tokens sorted by process to tokens sorted by clip; ``tokens[clip][process]`` of each."""
    starts = torch.tensor(tokens).T.flatten().cumsum(0).view(-1, len(tokens)).T - torch.tensor(tokens)
    pieces = [
        torch.arange(start, start + n)
        for begin, each in zip(starts.tolist(), tokens, strict=True)
        for start, n in zip(begin, each, strict=True)
    ]
    return torch.cat(pieces)


def _nothing(lm: VideoLM) -> VisionEmbeds:
    """No tokens, but with a gradient where those of others have one."""
    levels = len(getattr(lm.module.model.visual, "deepstack_visual_indexes", ()))
    width = lm.info.config.text_config.hidden_size
    made = [torch.zeros(0, width, dtype=lm.dtype, device=lm.device) for _ in range(levels + 1)]
    if torch.is_grad_enabled() and not is_frozen(lm):
        made = [tensor.requires_grad_() for tensor in made]
    return VisionEmbeds(made[0], tuple(made[1:]))


def _encode(lm: VideoLM, piece: Sequence[Pictures]) -> VisionEmbeds:
    """The tokens of some patches [n, ...] with their grids, in one pass."""
    patches = torch.cat([patches.to(lm.device) for patches, _ in piece])
    grids = torch.tensor([grid for _, grid in piece], device=lm.device)
    tower = lm.module.model.visual
    pixels = patches if isinstance(tower.patch_embed, FoldedPatchEmbed) else normalise(lm, patches)
    out = tower(pixels, grid_thw=grids)
    return VisionEmbeds(out.pooler_output, tuple(getattr(out, "deepstack_features", None) or ()))


def _pieces(pictures: Sequence[Pictures], most: int) -> Iterator[list[Pictures]]:
    """Pictures in order, cut between frame pairs into pieces of at most ``most`` patches, but at least one pair."""
    piece: list[Pictures] = []
    room = most
    for patches, (pairs, height, width) in pictures:
        begin, each = 0, height * width
        while begin < pairs:
            count = min(pairs - begin, max(room // each, 0 if piece else 1))
            if count:
                piece.append((patches[begin * each : (begin + count) * each], (count, height, width)))
                begin, room = begin + count, room - count * each
            if begin < pairs:
                yield piece
                piece, room = [], most
    yield piece


class StepVision:
    """A trained tower over the clips of one optimizer step, each once: rollout, scoring and all micro-batches of the
    update take the same embeddings. Their gradients add up in leaves, and :meth:`backward` takes them through the
    tower in one pass. Holds the tower's activations until then.

    Args:
        peers: processes that share the frames of all clips, and call :meth:`take` and :meth:`backward` together.
    """

    def __init__(self, lm: VideoLM, peers: Peers | None = None):
        self._lm, self._peers = lm, peers or Peers()
        self._made: dict[str, VisionEmbeds] = {}
        self._leaves: dict[str, VisionEmbeds] = {}

    def take(self, clips: Iterable[Clip]) -> tuple[dict[str, VisionEmbeds], list[Clip]]:
        """The leaves of clips by key, and the clips that went through the tower now."""
        by_key = {clip.key: clip for clip in clips}
        new = [clip for key, clip in by_key.items() if key not in self._leaves]
        if new:
            tower = self._lm.module.model.visual
            training = tower.training
            tower.train()  # a rollout is in evaluation mode, where activation checkpointing is off
            try:
                with torch.enable_grad():
                    pieces = encode_clips(self._lm, new, self._peers).split([c.n_tokens for c in new])
            finally:
                tower.train(training)
            for clip, made in zip(new, pieces, strict=True):
                leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in made.tensors]
                self._made[clip.key], self._leaves[clip.key] = made, VisionEmbeds(leaves[0], tuple(leaves[1:]))
        return {key: self._leaves[key] for key in by_key}, new

    def drop(self) -> None:
        """Let go of embeddings, their gradients and the tower's activations."""
        self._made, self._leaves = {}, {}

    def backward(self) -> None:
        """Accumulate the tower's gradients from what the leaves have collected. Once; the embeddings end with it."""
        pairs = [
            (made, leaf.grad)
            for key in self._made
            for made, leaf in zip(self._made[key].tensors, self._leaves[key].tensors, strict=True)
            if leaf.grad is not None
        ]
        self.drop()
        if pairs:
            torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])


@dataclass(frozen=True)
class Encoded:
    """Embeddings of all clips that will be asked for, by key."""

    found: Mapping[str, VisionEmbeds]

    def take(self, clips: Iterable[Clip]) -> tuple[dict[str, VisionEmbeds], list[Clip]]:
        """As :meth:`StepVision.take`."""
        return {clip.key: self.found[clip.key] for clip in clips}, []


Embeddings = EmbeddingCache | StepVision | Encoded
"""Where embeddings come from beside the tower: kept ones of a frozen tower, those of the step of a trained one, or
given ones.
"""


def encode_media(
    lm: VideoLM, clips: Iterable[Clip], held: Embeddings | None = None, peers: Peers | None = None
) -> tuple[dict[str, VisionEmbeds], list[Clip]]:
    """The tokens of each clip by its key, and the clips that went through the tower: each once, and none that is held.

    With a cache, which is for towers that are frozen, clips go through one by one, so that their bits don't depend on
    what else is in the batch.

    Args:
        peers: processes that call it together with the same clips, and share their frames.
    """
    if isinstance(held, StepVision | Encoded):
        return held.take(clips)
    by_key = {clip.key: clip for clip in clips}
    if held is None:
        sizes = [clip.n_tokens for clip in by_key.values()]
        pieces = encode_clips(lm, list(by_key.values()), peers).split(sizes) if by_key else []
        return dict(zip(by_key, pieces, strict=True)), list(by_key.values())
    found: dict[str, VisionEmbeds] = {}
    encoded = []
    for key, clip in by_key.items():
        name = held.key(key)
        kept = held.get(name)
        if peers is not None and not peers.agree(kept is not None):
            kept = None
        if kept is None:
            found[key] = encode_clips(lm, [clip], peers)
            encoded.append(clip)
            held.put(name, found[key].tensors)
        else:
            found[key] = VisionEmbeds(kept[0], tuple(kept[1:]))
    return found, encoded


def in_order(lm: VideoLM, found: Mapping[str, VisionEmbeds], media: Sequence[Clip]) -> VisionEmbeds:
    """The tokens of these clips one behind the other; none where there is no clip."""
    if media:
        return concat([found[clip.key] for clip in media])
    return VisionEmbeds(torch.zeros(0, lm.info.config.text_config.hidden_size, dtype=lm.dtype, device=lm.device))


def is_frozen(lm: VideoLM) -> bool:
    """Whether no parameter of the tower is trained."""
    return not any(p.requires_grad for p in lm.module.model.visual.parameters())


def shared_vision(
    lm: VideoLM, prompts: Sequence[Prompt], held: Embeddings | None = None, peers: Peers | None = None
) -> VisionEmbeds:
    """The visual tokens of the prompts' media in order; a clip that stands twice is encoded once."""
    media = [clip for p in prompts for clip in p.media]
    found, _ = encode_media(lm, media, held, peers)
    return in_order(lm, found, media)


def normalise(lm: VideoLM, patches: torch.Tensor) -> torch.Tensor:
    """(x / 255 - mean) / std of uint8 patches [N, 3 * 2 * p * p], in the tower's dtype."""
    scale = 1.0 / (255.0 * torch.tensor(lm.info.std, device=patches.device))
    shift = torch.tensor(lm.info.mean, device=patches.device) / torch.tensor(lm.info.std, device=patches.device)
    side = TUBELET * lm.info.geometry.patch**2
    x = patches.view(len(patches), 3, side).to(torch.float32, copy=True)
    x.mul_(scale[:, None]).sub_(shift[:, None])  # in place: a long clip is larger than what an allocator keeps
    return x.flatten(1).to(lm.module.model.visual.dtype)
