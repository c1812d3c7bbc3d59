"""The route of dense adapted layers on a GPU: one pass over the output, where it beats cuBLAS and addmm_ in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewrite.codegen.kernels import plans, tune
from rewrite.codegen.kernels.products import FULL, NARROW, SumOfProducts, Term
from rewrite.codegen.kernels.target import unusable

Tensor = torch.Tensor

FLOPS, BANDWIDTH = 790e12, 2.4e12
"""What cuBLAS reaches in a large product of bfloat16 on an H100, and bytes a second of its addmm_ of a small rank."""
EFFICIENCY = 0.85
"""Of cuBLAS, what the generated product is expected to reach before anything was timed."""


class Sum:
    """`(given + sum of scale_i * a_i b_i) * factor + bias`: a_i (M, k_i), b_i (k_i, width) in columns from start_i on.

    The first product has all N columns; given (M, N) and factor (N,) are for the kernel alone.
    """

    def __init__(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scale: Sequence[float],
        start: Sequence[int],
        bias: Tensor | None = None,
        given: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        self.a = [t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous() for t in a]
        self.b, self.scale, self.start = list(b), scale, start
        self.given, self.factor, self.bias = (t if t is None else t.contiguous() for t in (given, factor, bias))
        self.M, self.N = a[0].shape[0], b[0].shape[1]

    @property
    def others(self) -> list[Tensor]:
        """What is not an operand of a product, in the kernel's order."""
        return [t for t in (self.given, self.factor, self.bias) if t is not None]

    def kernel(self) -> SumOfProducts:
        return _kernel(self.a, self.b, self.scale, self.start, self.given, self.factor, self.bias)

    def supports(self) -> str | None:
        """Why there is no kernel for this sum, or None."""
        return _unsupported(self.a, self.b, self.scale, self.start, self.given, self.factor, self.bias)

    def fused(self, out: Tensor) -> None:
        """By the kernel, into out (M, N), contiguous."""
        kernel = self.kernel()
        pairs = [t for pair in zip(self.a, self.b, strict=True) for t in pair]
        kernel.launch(*pairs, *self.others, out, config=None, **kernel.lengths, M=self.M)

    def accumulated(self, out: Tensor) -> None:
        """By PyTorch's products: the first, then each of the others added in place."""
        terms = list(zip(self.a, self.b, self.scale, self.start, strict=True))
        if out.dtype == torch.float32 and not out.is_cuda:
            # Narrow ones first, of those of all columns: a wide product adds to what is there at no cost, while a
            # narrow one after it would read and write the output once more.  Other dtypes are not fast there, and keep
            # the order of an eager layer, to the bit.
            terms.sort(key=lambda term: (term[1].shape[1] < self.N, term[0].shape[1]))
        (a, b, scale, _), *rest = terms
        if self.bias is None and scale == 1.0:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(out if self.bias is None else self.bias, a, b, beta=self.bias is not None, alpha=scale, out=out)
        for a, b, scale, at in rest:
            part = out if b.shape[1] == self.N else out[:, at : at + b.shape[1]]
            part.addmm_(a, b, alpha=scale)

    def slower(self) -> str | None:
        """Why the kernel is not expected to beat cuBLAS, or None: what it saves is the traffic of later products."""
        if reason := _few(self.M, self.N):
            return reason
        product = sum(2 * self.M * a.shape[1] * b.shape[1] for a, b in zip(self.a, self.b, strict=True)) / FLOPS
        traffic = sum(2 * self.M * b.shape[1] for b in self.b[1:]) * self.a[0].itemsize / BANDWIDTH
        needed = product / (product + traffic)
        if needed <= EFFICIENCY:
            return None
        return (
            f"cuBLAS and addmm_ are faster than a generated product at {EFFICIENCY:.2f} of cuBLAS (needs {needed:.2f})"
        )

    def key(self) -> tuple[Any, ...]:
        return self.kernel(), self.a[0].device, self.M.bit_length()


@plans.by_layout
def _kernel(
    a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], start: Sequence[int], *others: Tensor | None
) -> SumOfProducts:
    N = b[0].shape[1]
    widths = [bi.shape[1] if bi.shape[1] < N else 0 for bi in b]
    given, factor, bias = (t is not None for t in others)
    return SumOfProducts(N, tuple(map(Term.of, a, b, scale, start, widths)), bias, a[0].dtype, given, factor)


@plans.by_layout
def _unsupported(
    a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], start: Sequence[int], *others: Tensor | None
) -> str | None:
    if reason := unusable(a[0].device):
        return reason
    if any(t is not None and t.dtype != a[0].dtype for t in (*a, *b, *others)):
        return "operands of several dtypes"
    if a[0].shape[0] == 0:
        return "no rows"
    return _kernel(a, b, scale, start, *others).supports()


def _few(M: int, N: int) -> str | None:
    """Why a kernel does not fill the device, or None: asked first, it costs no look-up."""
    if M * N >= FULL * 128 * 128:
        return None
    return f"{M} x {N} outputs: too few for tiles of 128 x 128 on every multiprocessor"


def into(out: Tensor, total: Sum) -> None:
    """Compute a sum by the faster of its two ways, timed or expected; by cuBLAS where there is no kernel."""
    timed = out.is_cuda and tune.wanted()
    if (not timed and total.slower()) or total.supports():
        return total.accumulated(out)
    ways: dict[str, Callable[[Tensor], None]] = {"cuBLAS": total.accumulated, "fused": total.fused}
    chosen = "fused" if total.slower() is None else "cuBLAS"
    if timed:
        chosen = tune.fastest(total.key(), list(ways), lambda way: ways[way](out), chosen)
    ways[chosen](out)


def _sum(x: Tensor, weight: Sequence[Tensor], bias: Any, h: Any, B: Any, scale: Any, start: Any) -> Sum:
    a = [t.reshape(-1, t.shape[-1]) for t in (x, *h)]
    return Sum(a, [t.t() for t in (weight[0], *B)], [1.0, *scale], [0, *start], bias)


def product(x: Tensor, weight: Sequence[Tensor], layout: str, *rest: Any) -> Tensor | str:
    """`x W' + bias + sum of scale * h B'`, (..., d_out), in one pass over it; or why that is left to the next route."""
    bias, h, B, scale, start, skip = rest
    if layout != "dense" or skip:
        return "columns of the weight are left out" if layout == "dense" else f"the weight is stored as {layout}"
    if not h:
        return "no branch"
    if x.numel() == 0 or x.shape[-1] <= NARROW:
        return f"{x.numel() // max(x.shape[-1], 1)} rows of {x.shape[-1]} values"
    if not (timed := tune.wanted()) and (reason := _few(x.numel() // x.shape[-1], weight[0].shape[0])):
        return reason
    if reason := _unsuitable(x, weight, bias, h, B, scale, start, timed):
        return reason
    out = x.new_empty(*x.shape[:-1], weight[0].shape[0])
    into(out.view(-1, out.shape[-1]), _sum(x, weight, bias, h, B, scale, start))
    return out


@plans.by_layout
def _unsuitable(
    x: Tensor, weight: Sequence[Tensor], bias: Any, h: Any, B: Any, scale: Any, start: Any, timed: bool
) -> str | None:
    total = _sum(x, weight, bias, h, B, scale, start)
    return total.supports() or (None if timed else total.slower())


def input_gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor | str:
    """Why this route leaves an input gradient to the next one."""
    return "one product: cuBLAS"
