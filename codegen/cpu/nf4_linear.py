"""The fused linear operators with NF4 weights on a CPU: a route of `rewrite.codegen.routes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rewrite.codegen import storage
from rewrite.codegen.branches import add_branches
from rewrite.codegen.cpu import nf4

Tensor = torch.Tensor


def product(x: Tensor, weight: Sequence[Tensor], layout: str, *rest: Any) -> Tensor | str:
    """`x W' + bias + sum of scale * h B'`, (..., d_out); or why the kernels do not compute it."""
    bias, h, B, scale, start, skip = rest
    if reason := _unsuitable(weight, layout) or ("columns that are left out" if skip else None):
        return reason
    packed, rows = _packed(weight, layout), x.reshape(-1, x.shape[-1])
    out = x.new_empty(*x.shape[:-1], packed.shape[0])
    y = out.view(-1, packed.shape[0])
    packed.product(rows, bias, y)
    add_branches(y, h, B, scale, start)
    return out


def input_gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor | str:
    """`dy W`, (..., d_in); or why the kernels do not compute it."""
    if reason := _unsuitable(weight, layout):
        return reason
    packed = _packed(weight, layout)
    return packed.input_gradient(dy.reshape(-1, dy.shape[-1])).view(*dy.shape[:-1], packed.shape[1])


def _unsuitable(weight: Sequence[Tensor], layout: str) -> str | None:
    return nf4.unreadable(weight) if layout.startswith("nf4:") else "a weight that is not stored as NF4"


def _packed(weight: Sequence[Tensor], layout: str) -> nf4.Packed:
    stored: Any = storage.layout(layout)
    return nf4.Packed(weight, stored.shape, stored.dtype, stored.blocksize)
