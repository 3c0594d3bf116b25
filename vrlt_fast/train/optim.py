"""AdamW over the trainable parameters, learning-rate schedules, and the guarded optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from vrlt_fast.config import OptimConfig
from vrlt_fast.model.load import VideoLM
from vrlt_fast.model.sharded import ShardedPolicy
from vrlt_fast.parallel.mesh import Mesh
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.weights import first_value, like, local
from vrlt_fast.train.rounding import noise_, round_to_bf16

PIECE = 2**24
"""Values whose moments are fp32 at a time where they are kept in bf16."""


def named_trainable(lm: VideoLM) -> list[tuple[str, torch.nn.Parameter]]:
    """Trainable parameters by name, in module order."""
    return [(name, p) for name, p in lm.named_parameters() if p.requires_grad]


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies of parameters that are kept in less.

    A step of 1e-6 is below half a bf16 ulp of most weights: without the copies it would be lost. ``masters`` are the
    tensors that are optimized, by name: the parameter itself where it is fp32 (or fp64) already, and of a parameter
    that processes share this one's shard, in the same memory. With ``optim.offload`` all are copies in host memory, and
    so are the moments. ``copied``: names of those that aren't the weights as the model computes with them.

    With ``optim.states = "bfloat16"`` the moments are rounded stochastically after each step, which is in fp32 itself;
    how is a function of ``seed``, the parameter's name and its number of steps, so that processes and resumed runs do
    the same.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        optim: OptimConfig,
        lr: float,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.parameters = dict(named)
        self.masters = {name: _master(p, offload=optim.offload) for name, p in named}
        self.copied = {name for name, p in named if (dtype if isinstance(p, DTensor) else p.dtype).itemsize < 4}
        self._narrow, self._seed = optim.states == "bfloat16", seed
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        others = [m for m in self.masters.values() if m.ndim < 2]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        super().__init__([g for g in groups if g["params"]], lr=lr, betas=optim.betas, fused=True)

    def copies(self) -> dict[str, torch.Tensor]:
        """The masters that are not the weights themselves, for the checkpoint; sharded as the parameters are."""
        wanted = {name: master.detach() for name, master in self.masters.items() if name in self.copied}
        return {f"master/{name}": like(master, self.parameters[name]) for name, master in wanted.items()}

    @torch.no_grad()
    def load_copies(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of :meth:`copies`; raises KeyError for one that is missing."""
        for name in self.copied:
            self.masters[name].copy_(local(tensors[f"master/{name}"]))

    def update(self) -> None:
        """One step from the parameters' gradients, which are cleared."""
        if self._narrow:
            self._narrow_step()
        else:
            for name, parameter in self.parameters.items():
                master = self.masters[name]
                if master is not parameter:
                    master.grad = None if parameter.grad is None else local(parameter.grad).to(master)
            self.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                own, master = local(parameter), self.masters[name]
                if own.data_ptr() != master.data_ptr():
                    own.copy_(master)
        self.clear()

    def gradients(self) -> list[torch.Tensor]:
        """Of all parameters that have one, what this process has of it; the same memory."""
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def _narrow_step(self) -> None:
        """As :meth:`step`, with moments in bf16; a piece of one parameter at a time is fp32."""
        groups = {id(master): group for group in self.param_groups for master in group["params"]}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            master = self.masters[name]
            state = self.state[master]
            if not state:
                state["step"] = torch.zeros((), device=master.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros(master.shape, dtype=torch.bfloat16, device=master.device)
            step = int(state["step"])
            for begin, skipped, part in _pieces(first_value(parameter), master.numel()):
                weights, first, second = (t.view(-1)[part] for t in (master, state["exp_avg"], state["exp_avg_sq"]))
                gradient = local(parameter.grad).reshape(-1)[part].to(master)
                wide = [moment.to(master.dtype) for moment in (first, second)]
                _adamw(weights, gradient, wide, state["step"].clone(), groups[id(master)])
                words = first.new_empty(len(first), dtype=torch.int32)
                noise = noise_(words, f"{self._seed} {step} {name} {begin}", skipped)
                first.copy_(round_to_bf16(wide[0].float(), noise & 0xFFFF))
                second.copy_(round_to_bf16(wide[1].float(), (noise >> 16) & 0xFFFF))
            state["step"] += 1

    def clear(self) -> None:
        """Drop all gradients."""
        self.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None


def _adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    moments: Sequence[torch.Tensor],
    step: torch.Tensor,
    group: Mapping[str, Any],
) -> None:
    """torch's fused step on flat tensors, in place; counts ``step`` on."""
    beta1, beta2 = group["betas"]
    adamw(
        [weights],
        [gradient],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


@torch.no_grad()
def _clip_shards(gradients: Sequence[torch.Tensor], most: float, owners: Replicas) -> float:
    """As torch's clip_grad_norm_, of gradients in shards."""
    own = torch.stack(torch._foreach_norm(list(gradients), 2.0, dtype=torch.float64)) if gradients else torch.zeros(1)
    norm = math.sqrt(owners.sum([float(own.square().sum())])[0])
    if gradients and norm > most:
        torch._foreach_mul_(list(gradients), most / (norm + 1e-6))
    return norm


def _master(parameter: torch.nn.Parameter, *, offload: bool) -> torch.nn.Parameter:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if offload:
        host = local(parameter).detach().to("cpu", wide, copy=True)
        return torch.nn.Parameter(host.pin_memory() if torch.cuda.is_available() else host)
    if isinstance(parameter, DTensor):
        return torch.nn.Parameter(local(parameter))
    return parameter if parameter.dtype == wide else torch.nn.Parameter(parameter.detach().to(wide))


def _pieces(first: int, count: int) -> Iterator[tuple[int, int, slice]]:
    """Pieces of a whole parameter that ``count`` values from its value ``first`` on have a part of: where the piece
    begins, what is left out of its beginning, and the part among the values.
    """
    at = first
    while at < first + count:
        begin = at // PIECE * PIECE
        end = min(begin + PIECE, first + count)
        yield begin, at - begin, slice(at - first, end - first)
        at = end


def make_optimizer(lm: VideoLM, optim: OptimConfig, lr: float, seed: int = 0) -> MasterAdamW:
    """AdamW with weight decay on matrices only; ``seed`` as in :class:`MasterAdamW`."""
    return MasterAdamW(named_trainable(lm), optim, lr, seed, lm.dtype)


def cosine_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to a tenth of the peak. ``step`` counts from 1."""
    if step <= warmup:
        return peak * step / max(warmup, 1)
    share = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(share, 1.0))))


def constant_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then constant. ``step`` counts from 1."""
    return peak * min(step / max(warmup, 1), 1.0)


SCHEDULES = {"constant": constant_lr, "cosine": cosine_lr}


def take_step(lm: VideoLM, optimizer: MasterAdamW, mesh: Mesh, loss: float, lr: float, grad_clip: float) -> float:
    """Bring the gradients of all processes together, and :func:`apply_step`; all call it together."""
    if not isinstance(lm, ShardedPolicy):
        mesh.everyone.add_gradients(p for _, p in named_trainable(lm))
        return apply_step(lm, optimizer, loss, lr, grad_clip)
    lm.finish()
    norm = apply_step(lm, optimizer, loss, lr, grad_clip, mesh.owners)
    lm.refresh()
    return norm


def apply_step(
    lm: VideoLM, optimizer: MasterAdamW, loss: float, lr: float, grad_clip: float, owners: Replicas | None = None
) -> float:
    """Clip the gradient, step, clear. Returns the gradient norm before clipping.

    Where loss or norm is not finite, weights and optimizer stay as they are.

    Args:
        owners: processes that have a shard of each parameter.
    """
    if owners is None or owners.world == 1:
        norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in named_trainable(lm)], grad_clip))
    else:
        norm = _clip_shards(optimizer.gradients(), grad_clip, owners)
    if not (math.isfinite(norm) and math.isfinite(loss)):
        optimizer.clear()
        return norm
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.update()
    return norm
