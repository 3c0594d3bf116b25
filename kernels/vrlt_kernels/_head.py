"""The matrix products of a language-model head z = H W^T + b over chunks of rows: logits, and the gradients.

Shapes: H [N, K], W [V, K], b [V]. With G [n, V] the gradient of a chunk's logits, or with D and coefficients c,
G = diag(c) D, applied to what is n x K instead of n x V:
    dH = diag(c) (D W)      dW = D^T (diag(c) H)      db = c D
Products over several chunks, and in half precision on the CPU all of them, add up in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import List, Optional, Sequence, Tuple, Union

import torch

from ._checks import FLOATS, INTEGERS, bad, compute_dtype, describe, tensor

Rows = Union[slice, torch.Tensor]
Head = Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]
"""hidden, weight, bias"""
HALF = (torch.float16, torch.bfloat16)
_COPIED = 2**21  # elements of a chunk's gradient, or of the weight, that are copied at a time: 8 MB in fp32


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    target: Optional[torch.Tensor] = None,
) -> None:
    """hidden [N, K], weight [V >= 1, K], bias [V] or None of one dtype (autocast aside) and device, target int [N]."""
    tensor("hidden", hidden, shape=[None, None], dtypes=FLOATS)
    same: Sequence[torch.dtype] = [hidden.dtype]
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        same = [x for x in FLOATS if x != torch.float64]  # fp64 isn't cast, as in a linear layer
    tensor("weight", weight, shape=[None, hidden.shape[1]], dtypes=same, like=hidden)
    if weight.shape[0] == 0:
        raise bad("weight", describe(weight), "at least one row")
    if bias is not None:
        tensor("bias", bias, shape=[weight.shape[0]], dtypes=same, like=hidden)
    if target is not None:
        tensor("target", target, shape=[hidden.shape[0]], dtypes=INTEGERS, like=hidden)


def autocast(hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> Head:
    """The head's operands in the dtype a linear layer would take them in."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def as_given(x: torch.Tensor) -> AbstractContextManager[object]:
    """No autocast inside an operator: its operands have the dtype to compute in."""
    return torch.autocast(x.device.type, enabled=False)


def rows_within(budget_bytes: float, weight: torch.Tensor, element: int) -> int:
    """How many rows of logits, ``element`` bytes each, fit in a budget; at least 1."""
    if not isinstance(budget_bytes, (int, float)) or not budget_bytes > 0:
        raise bad("budget_bytes", describe(budget_bytes) if budget_bytes is None else budget_bytes, "a number above 0")
    return max(1, int(min(budget_bytes, 2**62)) // (weight.shape[0] * element))


def partition(rows: int, budget_rows: int) -> Tuple[int, int]:
    """Of ``rows``, how many keep their logits (the first ones), and the rows of a chunk of the others.

    All are kept where they fit; else a quarter of the budget is the buffer for the rest.
    """
    if rows <= budget_rows:
        return rows, rows // 4 + 1  # no max(): under torch.compile it would tie the graph to the number of rows
    step = max(1, budget_rows // 4)
    return budget_rows - step, step


def chunks(start: int, stop: int, step: int) -> List[slice]:
    """[start, stop) in pieces of at most ``step``."""
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def project_(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> None:
    """out [n, V] = H W^T + b; fp32 from bf16 and fp16 operands rounds nothing in between."""
    if out.dtype != hidden.dtype:
        if out.device.type != "cpu":
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        else:
            states = hidden.to(out.dtype)
            for columns in chunks(0, weight.shape[0], max(1, _COPIED // max(1, weight.shape[1]))):
                out[:, columns] = states @ weight[columns].to(out.dtype).t()
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def power_of_two(*coefficients: Optional[torch.Tensor]) -> torch.Tensor:
    """2^k [] that brings the largest coefficient to about 1; on the device, without waiting for it."""
    given = [c.abs().amax() for c in coefficients if c is not None and c.numel()]
    largest = torch.stack(given).amax() if given else torch.ones((), device="cpu")
    exponent = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0).log2().floor()
    return torch.exp2(-exponent.clamp(-100, 100))


def live_rows(a: torch.Tensor, e: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Rows int64 whose coefficients aren't all 0; None: all of them, or not to be known without waiting for a GPU."""
    if a.device.type != "cpu":
        return None
    alive = (a != 0) if e is None else (a != 0) | (e != 0)
    return None if bool(alive.all()) else alive.nonzero()[:, 0]


class HeadGradients:
    """Collects dH, dW and db of a head, chunk by chunk; what isn't needed is neither made nor computed."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        *,
        needs: Tuple[bool, bool, bool],
        single: bool,
        keep_wide: bool = False,
    ) -> None:
        """``single``: only one chunk will come. ``keep_wide``: the results stay in the computing dtype."""
        self.hidden, self.weight = hidden, weight
        self.wide = compute_dtype(hidden)
        dtype = self.wide if keep_wide else hidden.dtype
        summed = dtype if single else self.wide
        vocab, width = weight.shape
        self.out = hidden.dtype if not keep_wide else self.wide
        self.dh = torch.zeros_like(hidden, dtype=dtype) if needs[0] else hidden.new_empty(0, dtype=dtype)
        self.dw = hidden.new_empty((vocab, width) if needs[1] else (0,), dtype=summed)
        self.db = hidden.new_empty(vocab if needs[2] else 0, dtype=summed)
        self.needs = needs
        self.first = True

    def add(
        self,
        rows: Rows,
        grad: torch.Tensor,
        coefficients: Optional[torch.Tensor],
        *,
        pick: Optional[torch.Tensor] = None,
        unscale: Optional[torch.Tensor] = None,
    ) -> None:
        """The chunk of the given rows of H: ``grad`` is D with its coefficients, or G itself (times 1 / ``unscale``).

        ``pick``: the rows of ``grad`` that count; ``rows`` and ``coefficients`` are of these alone.
        """
        hidden = self.hidden[rows] if isinstance(rows, slice) else self.hidden.index_select(0, rows)
        if len(hidden) == 0:
            return
        right = coefficients
        if coefficients is not None:
            if grad.dtype == torch.float16:
                # a * h would underflow: a power of two brings a to 1 and leaves in fp32.
                scale = power_of_two(coefficients)
                right, unscale = coefficients * scale, scale.reciprocal()
            hidden = (hidden * (coefficients if right is None else right)[:, None]).to(grad.dtype)
        sums = torch.ones(len(hidden), dtype=self.wide, device=grad.device) if right is None else right
        weighted = hidden.new_empty(hidden.shape if self.needs[0] else (0,), dtype=self.wide)

        def multiply(part: torch.Tensor, columns: slice) -> None:
            if self.needs[0]:
                _accumulate(weighted, part, self.weight[columns], columns.start == 0, None)
            if self.needs[1]:
                _accumulate(self.dw[columns], part.t(), hidden, self.first, unscale)
            if self.needs[2]:
                _accumulate(self.db[None, columns], sums.to(part.dtype)[None], part, self.first, unscale)

        for columns in self._columns(len(hidden), grad, pick, unscale):
            multiply(grad[:, columns] if pick is None else grad[:, columns].index_select(0, pick), columns)
        if self.needs[0]:
            factor = coefficients[:, None] if coefficients is not None else unscale
            self.dh[rows] = (weighted if factor is None else weighted * factor).to(self.dh.dtype)
        self.first = False

    def _columns(
        self, rows: int, grad: torch.Tensor, pick: Optional[torch.Tensor], unscale: Optional[torch.Tensor]
    ) -> List[slice]:
        """All columns at once, or as many as may be copied: picked rows, products to scale, halves to widen."""
        vocab, width = grad.shape[1], self.weight.shape[1]
        widened = unscale is not None or (grad.device.type == "cpu" and grad.dtype in HALF)
        copied = max(rows if pick is not None or widened else 0, width if widened else 0)
        return chunks(0, vocab, max(1, _COPIED // copied) if copied else vocab)

    def results(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dH, dW, db; empty where not needed. Without any live row all are zeros."""
        if self.first:
            self.dw.zero_()
            self.db.zero_()
        return self.dh, self.dw.to(self.out), self.db.to(self.out)


def _accumulate(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool, unscale: Optional[torch.Tensor]
) -> None:
    """out = left right, added to what is there unless it is the first; halves are multiplied into fp32."""
    exact = left.dtype not in HALF
    if unscale is None and (exact or out.device.type != "cpu"):
        if left.dtype == out.dtype:
            torch.mm(left, right, out=out) if first else out.addmm_(left, right)
        elif first:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        return
    wide = torch.float32 if left.dtype in HALF else left.dtype
    if exact or out.device.type == "cpu":
        product = torch.mm(left.to(wide), right.to(wide))
    else:
        product = torch.mm(left, right, out_dtype=wide)
    if unscale is not None:
        product *= unscale
    out.copy_(product) if first else out.add_(product)
