"""The vision tower over clips: uint8 patches to embeddings, once a clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.patch_embed import FoldedPatchEmbed
from vrlt_fast.model.prompt import Prompt
from vrlt_fast.video.preprocess import Clip
from vrlt_fast.video.sampling import TUBELET


def encode_clips(lm: VideoLM, clips: Sequence[Clip]) -> torch.Tensor:
    """Embeddings [sum of n_tokens, hidden] of the clips, in order; with gradients where the tower is trained.

    A frozen tower runs without a graph.
    """
    patches = torch.cat([clip.patches.to(lm.device) for clip in clips])
    grids = torch.tensor([clip.grid for clip in clips], device=lm.device)
    tower = lm.module.model.visual
    frozen = not any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        pixels = patches if isinstance(tower.patch_embed, FoldedPatchEmbed) else normalise(lm, patches)
        return tower(pixels, grid_thw=grids).pooler_output  # type: ignore[no-any-return]


def shared_vision(lm: VideoLM, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Embeddings [sum of visual tokens, hidden] of the prompts' clips in order; a clip that stands twice is encoded
    once.
    """
    clips = {p.clip.key: p.clip for p in prompts}
    pieces = encode_clips(lm, list(clips.values())).split([c.n_tokens for c in clips.values()])
    by_key = dict(zip(clips, pieces, strict=True))
    return torch.cat([by_key[p.clip.key] for p in prompts])


def normalise(lm: VideoLM, patches: torch.Tensor) -> torch.Tensor:
    """(x / 255 - mean) / std of uint8 patches [N, 3 * 2 * p * p], in the tower's dtype."""
    scale = 1.0 / (255.0 * torch.tensor(lm.info.std, device=patches.device))
    shift = torch.tensor(lm.info.mean, device=patches.device) / torch.tensor(lm.info.std, device=patches.device)
    side = TUBELET * lm.info.geometry.patch**2
    x = patches.view(len(patches), 3, side).float() * scale[:, None] - shift[:, None]
    return x.flatten(1).to(lm.module.model.visual.dtype)
