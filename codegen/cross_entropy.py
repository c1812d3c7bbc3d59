"""Head and cross entropy as one operator, in chunks of rows: the logits of a batch are never all there at once.

- `rewrite::linear_cross_entropy(x, weight, ...)`        the loss of a head, as `F.cross_entropy` reduces it
- `rewrite::linear_cross_entropy_core(x, weight, ...)`   its rows or their sum, and the gradients from the same logits

The core is opaque to AOTAutograd.  Each chunk's logits give the loss and, where they are wanted, the gradients of the
head's inputs at once, so nothing is computed twice and the backward only scales: dx (rows, d_in) is kept, not logits.
A stored weight is decoded once a call.  Statistics are float32, or float64 for float64 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen import torch_chunks
from rewrite.codegen.ops import decode, decoded_rows
from rewrite.codegen.rowwise import Chain
from rewrite.codegen.workspace import register_workspace
from rewrite.errors import RewriteError

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")

_HEAD = "Tensor x, Tensor[] weight, str layout, Tensor? bias, Tensor[] h, Tensor[] B, float[] scale, SymInt[] start"
_LOSS = "Tensor target, Tensor? class_weight, str steps, str reduction, int ignore_index, float label_smoothing"
_lib.define(f"linear_cross_entropy({_HEAD}, {_LOSS}) -> Tensor")
_lib.define(f"linear_cross_entropy_core({_HEAD}, {_LOSS}, Tensor? factor, bool[] wanted) -> (Tensor, Tensor[])")

_LOGITS, _ROWS = 1 << 23, 128
"""Entries in a chunk, and the rows that it has at least: enough for an efficient product, little beside the weight."""


@dataclass(frozen=True)
class _Head:
    """`x W' + b`, and `y[:, start : start + len(B)] += scale * h B'` for every branch, on some of the rows."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    h: Sequence[Tensor]
    B: Sequence[Tensor]
    scale: Sequence[float]
    start: Sequence[int]

    def columns(self, y: Tensor, i: int) -> Tensor:
        """What branch `i` adds to."""
        size = self.B[i].shape[0]
        return y if size == y.shape[1] else y[:, self.start[i] : self.start[i] + size]

    def logits(self, part: slice) -> Tensor:
        x = self.x[part]
        y = x @ self.w.t() if self.bias is None else torch.addmm(self.bias, x, self.w.t())
        for i, (h, B, s) in enumerate(zip(self.h, self.B, self.scale, strict=True)):
            self.columns(y, i).addmm_(h[part], B.t(), alpha=s)
        return y


class _Gradients:
    """Gradients of a head, chunk by chunk: those of rows are put in place, those of parameters are summed."""

    def __init__(self, head: _Head, wanted: Sequence[bool], dtype: torch.dtype) -> None:
        self.head, (self.x, self.w, self.bias, self.h, self.B) = head, wanted
        # Contiguous, whatever the inputs are, as the fake says.
        self.dx = [head.x.new_empty(head.x.shape)] if self.x else []
        self.dW = [head.w.new_zeros(head.w.shape, dtype=dtype)] if self.w else []
        self.dbias = [head.w.new_zeros(head.w.shape[0], dtype=dtype)] if self.bias else []
        self.dh = [h.new_empty(h.shape) for h in head.h] if self.h else []
        self.dB = [B.new_zeros(B.shape, dtype=dtype) for B in head.B] if self.B else []

    def add(self, part: slice, dy: Tensor) -> None:
        """Take in the gradient of the logits of some rows."""
        head = self.head
        for dx in self.dx:
            torch.mm(dy, head.w, out=dx[part])
        for dW in self.dW:
            _accumulate(dW, dy, head.x[part], 1.0)
        for dbias in self.dbias:
            dbias += dy.sum(0, dtype=dbias.dtype)
        for i, dh in enumerate(self.dh):
            torch.mm(head.columns(dy, i), head.B[i], out=dh[part]).mul_(head.scale[i])
        for i, dB in enumerate(self.dB):
            _accumulate(dB, head.columns(dy, i), head.h[i][part], head.scale[i])

    def result(self) -> list[Tensor]:
        found = [*self.dx, *self.dW, *self.dbias, *self.dh, *self.dB]
        return [t.to(self.head.x.dtype) for t in found]


def _accumulate(total: Tensor, dy: Tensor, x: Tensor, scale: float) -> None:
    """total += scale * dy' x; a product of half precision is added to a sum in float32."""
    if total.dtype == dy.dtype:
        total.addmm_(dy.t(), x, alpha=scale)
    else:
        total.add_(dy.t() @ x, alpha=scale)


@dataclass(frozen=True)
class _Targets:
    """What the rows of logits are compared with."""

    target: Tensor
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def weights(self, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For every row its class, 0 where it is ignored, and what it counts, 0 where it is ignored."""
        counted = target != self.ignore_index
        at = torch.where(counted, target, 0)
        if self.class_weight is None:
            return at, counted.to(dtype)
        return at, torch.where(counted, self.class_weight.to(dtype)[at], 0)

    def rows(self, logits: Tensor, part: slice, dtype: torch.dtype, slope: bool) -> tuple[Tensor, Tensor | None]:
        """The loss of every row, and where `slope` its gradient with respect to the logits."""
        target = self.target[part]
        at, weight = self.weights(target, dtype)
        at = at.unsqueeze(1)
        logp = torch.log_softmax(logits, -1, dtype=dtype)
        loss = -logp.gather(1, at).squeeze(1) * weight
        if not self.label_smoothing:
            if not slope:
                return loss, None
            p = logp.exp_().mul_(weight.unsqueeze(1))
            return loss, p.scatter_add_(1, at, -weight.unsqueeze(1))
        return self._smooth(logp, loss, at, weight, target != self.ignore_index, slope)

    def _smooth(self, logp: Tensor, loss: Tensor, at: Tensor, weight: Tensor, counted: Tensor, slope: bool):
        """As `rows`, with a share of the target spread over all classes, each with the weight of its own."""
        hard, share = 1 - self.label_smoothing, self.label_smoothing / logp.shape[1]
        w = None if self.class_weight is None else self.class_weight.to(logp.dtype)
        spread = -(logp.sum(1) if w is None else logp @ w)
        loss = hard * loss + share * torch.where(counted, spread, 0)
        if not slope:
            return loss, None
        total = float(logp.shape[1]) if w is None else w.sum()
        mask = counted.to(logp.dtype)
        p = logp.exp_().mul_((hard * weight + share * total * mask).unsqueeze(1))
        p.sub_(share * mask.unsqueeze(1) * (1 if w is None else w))
        return loss, p.scatter_add_(1, at, -hard * weight.unsqueeze(1))


def linear_cross_entropy(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    h: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    start: Sequence[int],
    target: Tensor,
    class_weight: Tensor | None,
    steps: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """`cross_entropy(steps(adapted_linear(x, weight, ...)), target)` without its logits.

    x (rows, d_in), weight (classes, d_in) in `layout`, bias (classes,), and the branches h, B, scale, start as in
    `adapted_linear`, all of x's dtype; target (rows,) int64; `steps` is what happens to the logits before the loss
    (`codegen.rowwise`).  The rest is as in `F.cross_entropy`, and so is the result; there is no second derivative.
    With `reduction="none"` nothing but x and h has a gradient.
    """
    head, loss = (x, weight, layout, bias, h, B, scale, start), (ignore_index, label_smoothing)
    wanted = [torch.is_grad_enabled() and _needs(t) for t in ([x], weight, [bias], h, B)]
    reduced = "none" if reduction == "none" else "sum"
    if reduced == "none" and any(wanted[i] for i in (1, 2, 4)):
        raise RewriteError('linear_cross_entropy(reduction="none") has no gradient for the parameters of its head')
    rest = target, class_weight, steps, reduced, *loss
    if reduction != "mean":
        found, _ = torch.ops.rewrite.linear_cross_entropy_core(*head, *rest, None, wanted)
    else:
        _, counts = _Targets(target, class_weight, *loss).weights(target, _statistics(x, steps))
        total = counts.sum()
        safe = torch.where(total == 0, 1, total)
        factor = 1 / torch.frexp(safe)[0]
        found, _ = torch.ops.rewrite.linear_cross_entropy_core(*head, *rest, factor, wanted)
        # The mantissa of the count is in the core; what is left is a power of two, with which gradients are scaled
        # without rounding and without leaving float16's range.  Where nothing counts the mean is nan, as 0 / 0 is,
        # but with a gradient of zero, as `F.cross_entropy` has it.
        found = torch.where(total == 0, torch.nan, found / (safe * factor))
    return found.to(Chain.parse(steps).dtype(x.dtype))


def _needs(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def chunk_rows(rows: int, classes: int) -> int:
    """Rows of a chunk for so many `rows` and `classes`; chunks are of about the same size.

    >>> chunk_rows(8192, 32000), chunk_rows(8192, 128256), chunk_rows(100, 50)
    (256, 128, 100)
    """
    most = max(_LOGITS // max(classes, 1), _ROWS)
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // chunks), 1)


def _core(
    x, weight, layout, bias, h, B, scale, start,
    target, class_weight, steps, reduction, ignore_index, label_smoothing, factor, wanted,
):  # fmt: skip
    head = _Head(x, decode(weight, layout).to(x.dtype), bias, h, B, scale, start)
    targets = _Targets(target, class_weight, ignore_index, label_smoothing)
    dtype = _statistics(x, steps)
    chain = Chain.parse(steps).without_widening(x.dtype)
    size = chunk_rows(x.shape[0], head.w.shape[0])
    if _is_plain(head, chain, dtype) and reduction == "sum" and not label_smoothing and torch_chunks.available():
        weight = None if class_weight is None else class_weight.to(dtype)
        found, slopes = torch_chunks.summed(x, head.w, bias, target, weight, ignore_index, size, wanted[:3])
        return (found, slopes) if factor is None else (found * factor, [t.mul_(factor) for t in slopes])
    gradients = _Gradients(head, wanted, dtype)
    losses = x.new_empty(x.shape[0], dtype=dtype)
    for first in range(0, x.shape[0], size):
        part = slice(first, first + size)
        logits, kept = chain.forward(head.logits(part))
        losses[part], slope = targets.rows(logits, part, dtype, any(wanted))
        if slope is not None:
            slope = slope if factor is None else slope.mul_(factor)
            gradients.add(part, chain.backward(slope.to(logits.dtype), kept, x.dtype))
    if reduction == "none":
        return losses, gradients.result()
    return losses.sum() if factor is None else losses.sum() * factor, gradients.result()


def _is_plain(head: _Head, chain: Chain, dtype: torch.dtype) -> bool:
    """Whether a head is nothing but a product, in the dtype of its losses."""
    return not head.h and not chain.steps and head.x.dtype == dtype


def statistics(dtype: torch.dtype, steps: Chain) -> torch.dtype:
    """The dtype of the losses of a head of `dtype`: that of its logits at last, and no less than float32."""
    return torch.promote_types(steps.dtype(dtype), torch.float32)


def _statistics(x: Tensor, steps: str) -> torch.dtype:
    return statistics(x.dtype, Chain.parse(steps))


def _core_fake(
    x, weight, layout, bias, h, B, scale, start,
    target, class_weight, steps, reduction, ignore_index, label_smoothing, factor, wanted,
):  # fmt: skip
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=_statistics(x, steps))
    shapes = [x.shape], [(decoded_rows(weight, layout), x.shape[1])], [(decoded_rows(weight, layout),)]
    groups = (*shapes, [t.shape for t in h], [t.shape for t in B])
    return loss, [x.new_empty(shape) for group, keep in zip(groups, wanted, strict=True) if keep for shape in group]


def _core_setup(ctx, inputs, output):
    _, weight, _, bias, h, B, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.sizes = 1, len(weight), int(bias is not None), len(h), len(B)
    ctx.wanted, ctx.rows = inputs[-1], inputs[11] == "none"
    ctx.save_for_backward(*output[1])


def _core_backward(ctx, dloss, dgradients):
    if any(g is not None for g in dgradients or ()):
        raise RewriteError("linear_cross_entropy has no second derivative: compile with chunked_loss=False")
    saved = iter(ctx.saved_tensors)
    groups = []
    for size, wanted in zip(ctx.sizes, ctx.wanted, strict=True):
        kept = [next(saved) if wanted else None for _ in range(size)]
        groups.append([None if t is None or dloss is None else _scaled(t, dloss, ctx.rows) for t in kept])
    (dx,), dW, dbias, dh, dB = groups
    rest = None if dh else []  # autograd takes an empty list of numbers for one of tensors
    return dx, dW, None, dbias[0] if dbias else None, dh, dB, rest, rest, *[None] * 8


def _scaled(gradient: Tensor, dloss: Tensor, rows: bool) -> Tensor:
    # In the dtype of the loss: the mean's 1 / rows would lose half of its digits in bfloat16.
    return (gradient * (dloss.unsqueeze(-1) if rows else dloss)).to(gradient.dtype)


_lib.impl("linear_cross_entropy", linear_cross_entropy, "CompositeImplicitAutograd")
_lib.impl("linear_cross_entropy_core", _core, "CompositeExplicitAutograd")
torch.library.register_fake("rewrite::linear_cross_entropy_core", _core_fake, lib=_lib)
torch.library.register_autograd(
    "rewrite::linear_cross_entropy_core", _core_backward, setup_context=_core_setup, lib=_lib
)


@register_flop_formula(torch.ops.rewrite.linear_cross_entropy_core)
def _core_flops(x, weight, layout, bias, h, B, scale, start, *rest, out_shape=None, **_) -> int:
    need_x, need_w, _, need_h, need_B = rest[-1]
    classes = weight[0][0] if layout == "dense" else decoded_rows((), layout)
    base = x[1] * classes * (1 + need_x + need_w)
    branches = sum(hi[1] * Bi[0] for hi, Bi in zip(h, B, strict=True)) * (1 + need_h + need_B)
    return 2 * x[0] * (base + branches)


@register_workspace(torch.ops.rewrite.linear_cross_entropy_core)
def _core_workspace(x, weight, layout, *rest) -> int:
    classes, dtype = decoded_rows(weight, layout), _statistics(x, rest[7])
    stored = 0 if layout == "dense" else classes * x.shape[1] * x.dtype.itemsize
    entries = chunk_rows(x.shape[0], classes) * classes
    need_w = rest[-1][1] and dtype != x.dtype  # the sum of its gradient, and a chunk's part
    return stored + entries * (2 * x.dtype.itemsize + dtype.itemsize) + need_w * classes * x.shape[1] * dtype.itemsize
