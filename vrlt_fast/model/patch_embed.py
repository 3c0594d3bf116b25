"""The patch embedding of a vision tower as the product that it is; of a frozen one with the normalisation in it, so
that it takes uint8 patches as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


class LinearPatchEmbed(torch.nn.Module):
    """A patch embedding of pixels [N, 3 * T * p * p] as one matrix product. The released one is a convolution whose
    kernel is the patch, and is run as such, several times slower. ``proj`` stays as it is, under its name.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = (original,)  # not a submodule: its names would appear twice
        self.proj = original.proj

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight
        return F.linear(pixels.to(weight.dtype), weight.flatten(1), self.proj.bias)


class FoldedPatchEmbed(torch.nn.Module):
    """A frozen patch embedding that takes uint8 patches [N, 3 * T * p * p]; gives [N, hidden] in the weights' dtype.

    ``proj`` stays as it is, under its name, so whatever saves or loads the model sees the original weights. What is
    multiplied is a copy, (W / (255 std)) in two parts of the weights' dtype, with pixels moved by a whole number near
    their mean: those are exact in bf16. So only sums and the result are rounded, which the usual path does too, after
    rounding its pixels. The copy is made again when ``proj`` was written to or moved.
    """

    def __init__(self, original: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.original = (original,)  # not a submodule: its names would appear twice
        self.proj = original.proj
        self.mean, self.std = tuple(mean), tuple(std)
        self._made_of: tuple[object, ...] = ()
        self._folded: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if patches.dtype != torch.uint8:
            raise TypeError(f"the patch embedding has the normalisation folded in: got {patches.dtype}, needs uint8")
        centre, high, low = self._weights()
        width = self.proj.weight[0].numel()
        x = torch.ones(len(patches), high.shape[1], dtype=high.dtype, device=patches.device)
        side = width // len(self.mean)
        torch.sub(patches.view(-1, len(self.mean), side), centre, out=x[:, :width].view(-1, len(self.mean), side))
        return torch.addmm(F.linear(x, low), x, high.t())

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight, bias = self.proj.weight, self.proj.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise RuntimeError("the patch embedding became trainable: call unfold_normalize_ first")
        made_of = tuple((x.data_ptr(), x._version, x.dtype, x.device) for x in (weight, bias) if x is not None)
        if made_of != self._made_of:
            self._folded, self._made_of = self._fold(), made_of
        return self._folded

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fold(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole numbers [3, 1]; high and low parts [hidden, width + 8], whose last columns are of the bias."""
        weight, bias = self.proj.weight, self.proj.bias
        mean, std = (torch.tensor(x, dtype=torch.float64, device=weight.device) * 255 for x in (self.mean, self.std))
        centre = mean.round()
        scaled = weight.double().flatten(2) / std[:, None]
        shift = (scaled * (centre - mean)[:, None]).sum((1, 2))
        shift = shift if bias is None else shift + bias.double()
        # 8 columns keep rows on 16 bytes. The bias is in two of them: pixels there are 1.
        exact = F.pad(scaled.flatten(1), (0, 8))
        exact[:, -8] = shift.to(weight.dtype).double()
        exact[:, -7] = shift - exact[:, -8]
        high = exact.to(weight.dtype)
        return centre.to(weight.dtype)[:, None], high, (exact - high.double()).to(weight.dtype)


def linear_patches_(tower: Any) -> None:
    """Make ``tower.patch_embed`` a matrix product, where it is a convolution over patches."""
    if _over_patches(tower.patch_embed) and not hasattr(tower.patch_embed, "original"):
        tower.patch_embed = LinearPatchEmbed(tower.patch_embed)


def released_patch_embed(tower: Any) -> Any:
    """The module that stood at ``tower.patch_embed`` when the model was made."""
    module = tower.patch_embed
    while hasattr(module, "original"):
        module = module.original[0]
    return module


def _over_patches(embed: Any) -> bool:
    proj = getattr(embed, "proj", None)
    return isinstance(proj, torch.nn.Conv3d) and proj.kernel_size == proj.stride and proj.groups == 1


def fold_normalize_(tower: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Make ``tower.patch_embed`` take uint8 patches as they are: (x / 255 - mean) / std is folded into its weights.

    ``state_dict()`` keeps its names and the original tensors. A tower that is folded already is folded anew.

    Raises:
        ValueError: the embedding is trained, or isn't one convolution over patches of as many channels as ``mean``.
    """
    unfold_normalize_(tower)
    embed = tower.patch_embed
    if not _over_patches(embed):
        raise ValueError(f"{type(embed).__name__} isn't one convolution over patches")
    proj = embed.proj
    if not len(mean) == len(std) == proj.in_channels or not all(s > 0 for s in std):
        raise ValueError(f"mean {mean} and std {std} don't fit {proj.in_channels} channels")
    if any(p.requires_grad for p in embed.parameters()):
        raise ValueError("the patch embedding is trained: only a frozen one can take the normalisation in")
    tower.patch_embed = FoldedPatchEmbed(embed, mean, std)


def unfold_normalize_(tower: Any) -> None:
    """Undo `fold_normalize_`: the original module, whose weights were never changed. Without a fold it does nothing."""
    if isinstance(tower.patch_embed, FoldedPatchEmbed):
        tower.patch_embed = tower.patch_embed.original[0]
