"""Views and casts of a weight `W + scale * B A`: weights of that form again."""

from __future__ import annotations

import operator
from typing import Any

import torch

from rewrite.codegen.factored import Factored, reader

aten = torch.ops.aten


@reader(aten.t.default, methods=("t",))
def t(w: Factored) -> Any:
    """t(W + s B A)  ->  t(W) + s A' B'"""
    return transpose(w, -2, -1)


@reader(torch.Tensor.mT.__get__, methods=("mT",))  # type: ignore[attr-defined]
def mT(w: Factored) -> Any:
    """(W + s B A).mT  ->  W.mT + s A' B'"""
    return transpose(w, -2, -1)


@reader(torch.Tensor.T.__get__, methods=("T",))  # type: ignore[attr-defined]
def T(w: Factored) -> Any:
    """(W + s B A).T  ->  W.T + s A' B'"""
    return transpose(w, -2, -1) if w.W.ndim == 2 else NotImplemented


@reader(aten.transpose.int, methods=("transpose", "swapaxes", "swapdims"))
def transpose(w: Factored, dim0: int, dim1: int) -> Any:
    """transpose(W + s B A)  ->  transpose(W) + s A' B'"""
    a, b = _negative(w, dim0), _negative(w, dim1)
    if a == b:
        return w
    if {a, b} == {-2, -1}:
        W = w.W.t() if w.W.ndim == 2 else w.W.transpose(-2, -1)
        return Factored(W, w.A, w.B, w.scale, not w.transposed)
    return w.leading(lambda t: t.transpose(a, b)) if max(a, b) < -2 else NotImplemented


@reader(aten.permute.default, methods=("permute",))
def permute(w: Factored, *dims: Any) -> Any:
    """permute(W + s B A)  ->  permute(W) + s permute(B A)"""
    order = [_negative(w, d) for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    if set(order[-2:]) != {-2, -1}:
        return NotImplemented
    flat = w.leading(lambda t: t.permute(*order[:-2], -2, -1)) if w.W.ndim > 2 else w
    return flat if order[-2] == -2 else transpose(flat, -2, -1)


@reader(operator.getitem, torch.Tensor.__getitem__)
def getitem(w: Factored, index: Any) -> Any:
    """(W + s B A)[e, rows, columns]  ->  W[e, rows, columns] + s B[e, rows] A[e, :, columns]"""
    split = _split_index(w, index)
    if split is None:
        return NotImplemented
    front, rows, columns = split
    if not isinstance(columns, slice) or not (isinstance(rows, slice) or (not front and _is_vector(rows))):
        return NotImplemented
    every, (of_A, of_B) = slice(None), (rows, columns) if w.transposed else (columns, rows)
    A = w.A if not front and _is_whole(of_A) else w.A[(*front, every, of_A)]
    B = w.B if not front and _is_whole(of_B) else w.B[(*front, of_B, every)]
    return Factored(w.W[index], A, B, w.scale, w.transposed)


@reader(aten.select.int, methods=("select",))
def select(w: Factored, dim: int, index: Any) -> Any:
    """select(W + s B A, e)  ->  W[e] + s B[e] A[e]"""
    d = _negative(w, dim)
    return w.along(d, lambda t, at: t.select(at, index)) if d < -2 else NotImplemented


@reader(aten.narrow.default, methods=("narrow",))
def narrow(w: Factored, dim: int, start: Any, length: Any) -> Any:
    """narrow(W + s B A)  ->  narrow(W) + s B[rows] A[:, columns]"""
    return w.along(_negative(w, dim), lambda t, at: t.narrow(at, start, length))


@reader(aten.index_select.default, methods=("index_select",))
def index_select(w: Factored, dim: int, index: Any) -> Any:
    """index_select(W + s B A, i)  ->  W[i] + s B[i] A[i]"""
    return w.along(_negative(w, dim), lambda t, at: t.index_select(at, index))


@reader(aten.unbind.int, methods=("unbind",))
def unbind(w: Factored, dim: int = 0) -> Any:
    """unbind(W + s B A)  ->  W[e] + s B[e] A[e], ..."""
    return tuple(select(w, dim, i) for i in range(w.W.shape[dim])) if _negative(w, dim) < -2 else NotImplemented


@reader(aten.chunk.default, methods=("chunk",))
def chunk(w: Factored, chunks: int, dim: int = 0) -> Any:
    """chunk(W + s B A)  ->  chunk(W)[i] + s B[rows] A[:, columns], ..."""
    return split(w, -(-w.W.shape[dim] // chunks), dim)


@reader(aten.split.Tensor, aten.split_with_sizes.default, methods=("split", "split_with_sizes"))
def split(w: Factored, split_size: Any, dim: int = 0) -> Any:
    """split(W + s B A)  ->  split(W)[i] + s B[rows] A[:, columns], ..."""
    whole = w.W.shape[dim]
    sizes = split_size
    if not isinstance(split_size, (tuple, list)):
        sizes = [min(split_size, whole - at) for at in range(0, whole, split_size)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(w, dim, start, size) for start, size in zip(starts, sizes, strict=True))


@reader(aten.unsqueeze.default, methods=("unsqueeze",))
def unsqueeze(w: Factored, dim: int) -> Any:
    """unsqueeze(W + s B A)  ->  unsqueeze(W) + s unsqueeze(B) unsqueeze(A)"""
    d = dim if dim < 0 else dim - w.W.ndim - 1
    return w.leading(lambda t: t.unsqueeze(d)) if d < -2 else NotImplemented


@reader(aten.expand.default, methods=("expand",))
def expand(w: Factored, *sizes: Any) -> Any:
    """expand(W + s B A)  ->  expand(W) + s expand(B) expand(A)"""
    wanted = list(sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes)
    if any(a not in (-1, b) for a, b in zip(wanted[-2:], w.W.shape[-2:], strict=True)):
        return NotImplemented
    return w.leading(lambda t: t.expand(*wanted[:-2], -1, -1))


@reader(aten.view.default, aten.reshape.default, methods=("view", "reshape"))
def reshape(w: Factored, *sizes: Any) -> Any:
    """reshape(W + s B A)  ->  reshape(W) + s reshape(B) A, where rows stay rows of the same columns"""
    size = list(sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes)
    if len(size) < 2 or not all(isinstance(s, int) for s in (*size, *w.W.shape)):
        return NotImplemented
    rest = torch.Size(s for s in size if s != -1).numel()
    size = [s if s != -1 else w.W.shape.numel() // max(rest, 1) for s in size]
    if size[-1] != w.W.shape[-1] or not w.W.shape.numel():
        return NotImplemented
    if size[-2] == w.W.shape[-2]:
        return w.leading(lambda t: t.reshape(*size[:-2], *t.shape[-2:]))
    if w.W.ndim != 2:
        return NotImplemented
    # One matrix whose rows are taken apart, head by head: each piece reads the whole other factor.
    rows = w.left.reshape(*size[:-1], -1)
    other = w.right.expand(*size[:-2], -1, -1)
    return Factored(w.W.reshape(*size), other, rows, w.scale, False)


@reader(methods=("contiguous",))
def contiguous(w: Factored) -> Any:
    """contiguous(W + s B A)  ->  contiguous(W) + s B A"""
    return Factored(w.W.contiguous(), w.A, w.B, w.scale, w.transposed)


@reader(methods=("detach",))
def detach(w: Factored) -> Any:
    """detach(W + s B A)  ->  detach(W) + s detach(B) detach(A)"""
    return w.leading(lambda t: t.detach())


@reader(methods=("to",))
def to(w: Factored, *args: Any, **kwargs: Any) -> Any:
    """to(W + s B A, dtype)  ->  to(W, dtype) + s B A, multiplied in that dtype"""
    if not all(isinstance(a, torch.dtype) for a in args) or not set(kwargs) <= {"dtype"}:
        return NotImplemented
    return Factored(w.W.to(*args, **kwargs), w.A, w.B, w.scale, w.transposed)


@reader(methods=("float",))
def float(w: Factored) -> Any:
    """float(W + s B A)  ->  float(W) + s B A, multiplied in float32"""
    return to(w, torch.float32)


@reader(methods=("bfloat16",))
def bfloat16(w: Factored) -> Any:
    """bfloat16(W + s B A)  ->  bfloat16(W) + s B A, multiplied in bfloat16"""
    return to(w, torch.bfloat16)


def _negative(w: Factored, dim: int) -> int:
    return dim if dim < 0 else dim - w.W.ndim


def _is_vector(index: Any) -> bool:
    return not isinstance(index, (int, slice, tuple, list)) and getattr(index, "ndim", 0) == 1


def _is_whole(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _split_index(w: Factored, index: Any) -> tuple[tuple[Any, ...], Any, Any] | None:
    """An index as those of the leading dimensions, of the rows and of the columns; None where they mix."""
    items = list(index) if isinstance(index, tuple) else [index]
    sizes = [_consumed(item) for item in items]
    if Ellipsis in [i for i in items if isinstance(i, type(Ellipsis))]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (w.W.ndim - sum(sizes))
    else:
        items += [slice(None)] * (w.W.ndim - sum(sizes))
    front: list[Any] = []
    while items and (items[0] is None or sum(_consumed(i) for i in front) < w.W.ndim - 2):
        front.append(items.pop(0))
    exact = sum(_consumed(i) for i in front) == w.W.ndim - 2
    return (tuple(front), items[0], items[1]) if exact and len(items) == 2 else None


def _consumed(item: Any) -> int:
    """How many dimensions an item of an index takes up."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if getattr(item, "dtype", None) == torch.bool else 1
