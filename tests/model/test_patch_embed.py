"""fold_normalize_: uint8 patches into a frozen patch embedding, as good as the usual path, and not in the weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

from vrlt_fast.model.load import CLIP_MEAN, CLIP_STD
from vrlt_fast.model.patch_embed import (
    FoldedPatchEmbed,
    fold_normalize_,
    linear_patches_,
    released_patch_embed,
    unfold_normalize_,
)


class Tower(torch.nn.Module):
    """What fold_normalize_ needs of a tower; the embedding is HF's."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        self.patch_embed = Qwen2_5_VisionPatchEmbed(14, 2, 3, 192)
        if bias:
            self.patch_embed.proj.bias = torch.nn.Parameter(torch.randn(192))
        self.to(dtype).requires_grad_(False)


def usual(tower: Tower, patches: torch.Tensor) -> torch.Tensor:
    """Normalised in fp32, rounded to the tower's dtype, embedded."""
    mean, std = (torch.tensor(x).repeat_interleave(392) for x in (CLIP_MEAN, CLIP_STD))
    return tower.patch_embed((patches.float() / 255 - mean) / std)


def exact(tower: Tower, patches: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x, dtype=torch.float64).repeat_interleave(392) for x in (CLIP_MEAN, CLIP_STD))
    proj = tower.patch_embed.proj
    bias = None if proj.bias is None else proj.bias.double()
    return F.linear((patches.double() / 255 - mean) / std, proj.weight.double().flatten(1), bias)


def clips(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (64, 1176), generator=generator, dtype=torch.uint8)
    flat = torch.randint(0, 256, (64, 1), generator=generator, dtype=torch.uint8).repeat(1, 1176)
    smooth = (flat.float() * 0.8 + noise.float() * 0.1).to(torch.uint8)
    return {"noise": noise, "flat": flat, "smooth": smooth, "white": torch.full_like(flat, 255)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_no_worse_than_the_usual_path(dtype: torch.dtype, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    tower = Tower(dtype, bias=bias)
    for name, patches in clips(seed).items():
        unfold_normalize_(tower)
        want, got = exact(tower, patches), usual(tower, patches)
        fold_normalize_(tower, CLIP_MEAN, CLIP_STD)
        folded = tower.patch_embed(patches)
        assert folded.dtype == dtype
        mine, theirs = ((x.double() - want).square().mean().sqrt() for x in (folded, got))
        # In fp32 both have the error of the sums alone, whose order is the matrix product's.
        assert mine <= theirs * (1 if dtype == torch.bfloat16 else 1.5), name


def test_saved_and_restored_weights_are_the_original_ones(seed: int) -> None:
    torch.manual_seed(seed)
    tower = Tower(torch.bfloat16, bias=False)
    embed, before = tower.patch_embed, copy.deepcopy(tower.state_dict())
    fold_normalize_(tower, CLIP_MEAN, CLIP_STD)
    tower.patch_embed(clips(seed)["noise"])
    fold_normalize_(tower, CLIP_MEAN, CLIP_STD)
    assert isinstance(tower.patch_embed, FoldedPatchEmbed)
    for state in (tower.state_dict(), dict(tower.named_parameters())):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
    unfold_normalize_(tower)
    unfold_normalize_(tower)
    assert tower.patch_embed is embed
    assert torch.equal(embed.proj.weight, before["patch_embed.proj.weight"])


def test_weights_loaded_after_the_fold_are_taken(seed: int) -> None:
    torch.manual_seed(seed)
    tower, other = Tower(torch.bfloat16, bias=True), Tower(torch.bfloat16, bias=True)
    patches = clips(seed)["noise"]
    for each in (tower, other):
        fold_normalize_(each, CLIP_MEAN, CLIP_STD)
    before = tower.patch_embed(patches)
    tower.load_state_dict(other.state_dict())
    assert torch.equal(tower.patch_embed(patches), other.patch_embed(patches))
    assert not torch.equal(tower.patch_embed(patches), before)
    assert tower.to(torch.float32).patch_embed(patches).dtype == torch.float32


def test_what_is_refused(seed: int) -> None:
    tower = Tower(torch.float32, bias=False)
    with pytest.raises(ValueError, match="channels"):
        fold_normalize_(tower, CLIP_MEAN[:2], CLIP_STD[:2])
    tower.patch_embed.proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        fold_normalize_(tower, CLIP_MEAN, CLIP_STD)
    tower.requires_grad_(False)
    fold_normalize_(tower, CLIP_MEAN, CLIP_STD)
    patches = clips(seed)["noise"]
    with pytest.raises(TypeError, match="uint8"):
        tower.patch_embed(patches.float())
    tower.requires_grad_(True)
    with pytest.raises(RuntimeError, match="trainable"):
        tower.patch_embed(patches)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_the_convolution(bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    tower = Tower(torch.float64, bias=bias).requires_grad_(True)
    names, original, pixels = list(tower.state_dict()), tower.patch_embed, torch.randn(5, 1176, dtype=torch.float64)
    weights = list(tower.parameters())
    slope = torch.randn(5, 192, dtype=torch.float64)
    want = original(pixels)
    expected = torch.autograd.grad(want, weights, slope)
    linear_patches_(tower)
    got = tower.patch_embed(pixels)
    assert list(tower.state_dict()) == names
    assert released_patch_embed(tower) is original
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(torch.autograd.grad(got, weights, slope), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    linear_patches_(tower.requires_grad_(False))
    fold_normalize_(tower, CLIP_MEAN, CLIP_STD)
    assert released_patch_embed(tower) is original
