"""A model whose weights processes share (FSDP2), beside the whole one that rolls out.

The language model's layers are gathered one by one as they run. Every forward and backward pass is thus one that all
these processes make, in the same order: a process without tokens for one takes :meth:`ShardedLM.idle`. A trained tower
is gathered once a step instead, and its gradients are brought together once, so that each process may encode as many
clips as it has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vrlt_fast.model.language import GroupPass, Inputs, head_untouched, run_text
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.vision import is_frozen
from vrlt_fast.parallel.weights import Arena, shard_, take_shard
from vrlt_kernels import GroupSpans

T = TypeVar("T")
ENTRY = "vrlt_entry"


class ShardedLM(VideoLM):
    """A frozen model in shards.

    Args:
        lm: whole; its module is sharded in place, but for its tower.
        mesh: its last dimension shares weights; the one before it, where there is one, has copies of them.
    """

    def __init__(self, lm: VideoLM, mesh: DeviceMesh, *, wide: bool = False):
        self._dtype = lm.dtype
        super().__init__(lm.info, lm.module)
        visual = self.module.model.visual
        self.tower = None if is_frozen(lm) else visual
        left = visual.parameters() if self.tower is None else ()
        units = [*self.module.model.language_model.layers, *([visual] if self.tower is not None else [])]
        shard_(self.module, units, mesh, self._dtype, wide=wide, left=left)
        setattr(self.module, ENTRY, _call)
        register_fsdp_forward_method(self.module, ENTRY)
        if self.tower is not None:
            self.tower.set_reshard_after_forward(False)
            self.tower.set_reshard_after_backward(False)
            self.tower.set_requires_gradient_sync(False)
        with torch.no_grad():
            self.run(lambda: None)  # the first module that runs is the one that knows of all others

    @property
    def in_shards(self) -> bool:
        return True

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._dtype

    def run(self, function: Callable[..., T], *args: Any, **more: Any) -> T:
        """A pass: its tensors, in a tuple or alone, must be what the function returns."""
        out: T = getattr(self.module, ENTRY)(function, *args, **more)
        if not torch.is_grad_enabled():  # no backward pass will let go of embedding and head
            self.module.reshard()
        return out

    def idle(self) -> torch.Tensor:
        """A pass over one token: zero, and so is its gradient, for every parameter of the language model."""
        return self.run(self._idle)

    def _idle(self) -> torch.Tensor:
        one = torch.zeros(1, dtype=torch.int64, device=self.device)
        embeds = self.module.get_input_embeddings()(one)
        inputs = Inputs(embeds, one.expand(3, -1))
        hidden = run_text(self, inputs, GroupPass(GroupSpans.of([1], [[]])))
        return head_untouched(self, hidden)


def _call(function: Callable[..., T], *args: Any, **more: Any) -> T:
    return function(*args, **more)


class ShardedPolicy(ShardedLM):
    """A model that is trained in shards, fp32 where the whole one has less; ``whole`` has what they are after each
    :meth:`refresh`, for rollouts and for whoever wants ordinary tensors.

    Args:
        lm: whole; becomes ``whole``, without gradients.
    """

    def __init__(self, lm: VideoLM, mesh: DeviceMesh):
        self._whole = VideoLM(lm.info, lm.module)
        super().__init__(VideoLM(lm.info, _twin(lm.module)), mesh, wide=True)
        self._named = list(self.module.named_parameters())
        whole = dict(lm.module.named_parameters())
        self._pairs = [(p, whole[name]) for name, p in self._named if isinstance(p, DTensor)]
        lm.module.requires_grad_(False)
        self._arena = Arena([(p, w) for p, w in self._pairs if p.requires_grad])
        self.refresh()

    @property
    def whole(self) -> VideoLM:
        return self._whole

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The shards; while weights are gathered the module has whole ones in their place."""
        return self._named

    def refresh(self) -> None:
        """Take the shards as they are now."""
        self._arena.fill()
        if self.tower is not None:
            self.tower.reshard()
            self.tower.unshard()

    def restart(self) -> None:
        """Have the shards be what ``whole`` is, to its precision."""
        for parameter, whole in self._pairs:
            take_shard(parameter, whole)
        self.refresh()

    def finish(self) -> None:
        """Bring the tower's gradients of a step together; those of the language model are already."""
        if self.tower is None:
            return
        geometry = self.info.geometry
        pixels = torch.zeros(geometry.merge**2, 6 * geometry.patch**2, dtype=self.dtype, device=self.device)
        grid = torch.tensor([[1, geometry.merge, geometry.merge]], device=self.device)
        self.tower.set_requires_gradient_sync(True)
        out = self.tower(pixels, grid_thw=grid)
        made = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        torch.autograd.backward(sum(tensor.sum() for tensor in made) * 0.0)
        self.tower.set_requires_gradient_sync(False)


def _twin(module: nn.Module) -> nn.Module:
    """The same module over the same parameters and buffers, with its own hooks; a frozen tower is the same one."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    visual: Any = module.get_submodule("model.visual")
    if not any(p.requires_grad for p in visual.parameters()):
        kept[id(visual)] = visual
    return copy.deepcopy(module, kept)
