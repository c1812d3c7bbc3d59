"""Products with a weight `W + scale * B A`: the product with W, and a factored branch.

The scale stands on the (..., r) product, the smallest tensor on the way.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch._C import _nn  # type: ignore[attr-defined]  # where Dynamo finds F.linear

import rewrite.codegen.grouped  # noqa: F401  (defines torch.ops.rewrite.grouped_product)
from rewrite.codegen.factored import Factored, reader

aten = torch.ops.aten


@reader(F.linear, _nn.linear, aten.linear.default)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """linear(x, W + s B A, b)  ->  linear(x, W, b) + linear(linear(x, A) * s, B)"""
    if not isinstance(weight, Factored) or isinstance(input, Factored) or weight.W.ndim != 2:
        return NotImplemented
    return F.linear(input, weight.W, bias) + _through(input, weight)


@reader(
    operator.matmul,
    torch.Tensor.__matmul__,
    *(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default),
    methods=("matmul", "mm", "bmm", "mv"),
)
def matmul(input: Any, other: Any) -> Any:
    """x @ (W + s B A)  ->  x @ W + (x @ A' * s) @ B', and the same from the other side"""
    if isinstance(input, Factored) == isinstance(other, Factored):
        return NotImplemented
    if isinstance(other, Factored):
        return torch.matmul(input, other.W) + _after(input, other)
    h = input.scaled(torch.matmul(input.right, other))
    return torch.matmul(input.W, other) + torch.matmul(input.left, h)


@reader(aten.addmm.default, aten.baddbmm.default, methods=("addmm", "baddbmm"))
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """addmm(b, x, W + s B A)  ->  addmm(b, x, W) + (x @ A' * s) @ B'"""
    if not isinstance(mat2, Factored) or isinstance(mat1, Factored) or isinstance(input, Factored):
        return NotImplemented
    w = Factored(mat2.W, mat2.A, mat2.B, mat2.scale * alpha, mat2.transposed)
    product = torch.addmm if w.W.ndim == 2 else torch.baddbmm
    return product(input, mat1, w.W, beta=beta, alpha=alpha) + _after(mat1, w)


@reader(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Any:
    """einsum(x, W + s B A)  ->  einsum(x, W) + einsum(einsum(x, A) * s, B)"""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    found = [i for i, o in enumerate(operands) if isinstance(o, Factored)]
    terms = _einsum_terms(equation, found[0]) if len(operands) == 2 and len(found) == 1 else None
    if terms is None:
        return NotImplemented
    (w,), x = [operands[i] for i in found], operands[1 - found[0]]
    letters, inner, near, middle, far, out = terms
    first, second = (w.right, w.left) if near[-1] == letters[-1] else (w.left, w.right)
    h = w.scaled(torch.einsum(f"{inner},{near}->{middle}", x, first))
    base = torch.einsum(equation, *(w.W if isinstance(o, Factored) else o for o in operands))
    return base + torch.einsum(f"{middle},{far}->{out}", h, second)


def _einsum_terms(equation: Any, at: int) -> tuple[str, str, str, str, str, str] | None:
    """Letters of the weight, of x, of the factor next to x, of their product, of the other factor, of the result."""
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    letters, inner = inputs.split(",")[at], inputs.split(",")[1 - at]
    rows, columns = letters[-2:]
    contracted = [c for c in (rows, columns) if c in inner and c not in out]
    kept = [c for c in (rows, columns) if c not in inner and c in out]
    if len(set(letters)) < len(letters) or len(contracted) != 1 or len(kept) != 1:
        return None
    r = next(c for c in "rabcdefghijklmnopqstuvwxyz" if c not in equation)
    lead = letters[:-2]
    middle = out.replace(kept[0], r) + "".join(c for c in lead if c not in out)
    left, right = lead + rows + r, lead + r + columns
    near, far = (right, left) if contracted[0] == columns else (left, right)
    return letters, inner, near, middle, far, out


_GROUPED = tuple(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)


@reader(*_GROUPED, aten._grouped_mm.default)
def grouped_mm(mat_a: Any, mat_b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """grouped_mm(x, W + s B A, offs)  ->  grouped_mm(x, W, offs) + grouped_product(grouped_product(x, A') * s, B')"""
    if not _is_grouped(mat_a, mat_b) or offs is None or bias is not None or out_dtype is not None:
        return NotImplemented
    return _GROUPED[0](mat_a, mat_b.W, offs=offs) + _grouped_after(mat_a, mat_b, offs)


# The stand-in of transformers computes the dense gradient of every expert, frozen or not: ours does not.
@reader("transformers::grouped_mm_fallback", torch.ops.rewrite.grouped_product)
def grouped_product(input: Any, weight: Any, offs: Any) -> Any:
    """grouped(x, W + s B A, offs)  ->  grouped_product(x, W, offs) + grouped_product(grouped_product(x, A') * s, B')"""
    if not _is_grouped(input, weight):
        return NotImplemented
    return torch.ops.rewrite.grouped_product(input, weight.W, offs) + _grouped_after(input, weight, offs)


@reader(F.embedding)
def embedding(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """embedding(ids, W + s B A)  ->  embedding(ids, W) + embedding(ids, B) * s @ A"""
    if not isinstance(weight, Factored) or weight.W.ndim != 2 or max_norm is not None:
        return NotImplemented
    if sparse or scale_grad_by_freq:  # gradients of W' itself, which no factor has
        return NotImplemented
    rows = F.embedding(input, weight.W, padding_idx)
    # Looked up first, then cast: a cast of all rows would be as long as the vocabulary.
    h = F.embedding(input, weight.A.transpose(-2, -1) if weight.transposed else weight.B)
    h = h if h.dtype == rows.dtype else h.to(rows.dtype)
    branch = torch.matmul(weight.scaled(h), weight.right)
    if padding_idx is not None:  # that row has a value, and no gradient
        padding = input == padding_idx % weight.W.shape[0]
        branch = torch.where(padding.unsqueeze(-1), branch.detach(), branch)
    return rows + branch


def _after(x: Any, w: Factored) -> Any:
    """`x @ (scale * left @ right)`."""
    if _keeps_casts(x, w):
        A, B = (w.A, w.B) if w.transposed else (w.B.transpose(-2, -1), w.A.transpose(-2, -1))
        return torch.ops.rewrite.low_rank(x, A, B, w.scale)
    return torch.matmul(w.scaled(torch.matmul(x, w.left)), w.right)


def _through(x: Any, w: Factored) -> Any:
    """`linear(x, scale * left @ right)`."""
    if _keeps_casts(x, w):
        A, B = (w.B.transpose(-2, -1), w.A.transpose(-2, -1)) if w.transposed else (w.A, w.B)
        return torch.ops.rewrite.low_rank(x, A, B, w.scale)
    return F.linear(w.scaled(F.linear(x, w.right)), w.left)


def _keeps_casts(x: Any, w: Factored) -> bool:
    """Whether eager autograd would keep a cast copy of the parameters beside them."""
    return isinstance(x, torch.Tensor) and w.W.ndim == 2 and x.ndim > 1 and w.A.dtype != x.dtype == w.W.dtype


def _is_grouped(x: Any, w: Any) -> bool:
    return isinstance(w, Factored) and not isinstance(x, Factored) and w.W.ndim == 3 and x.ndim == 2


def _grouped_after(x: Any, w: Factored, offs: Any) -> Any:
    # The factors as they are: the operator casts them, and keeps no copy.
    A, B = w.A.transpose(-2, -1), w.B.transpose(-2, -1)
    down, up = (A, B) if w.transposed else (w.B, w.A)
    product = torch.ops.rewrite.grouped_product
    return product(w.scaled(product(x, down, offs)), up, offs)
