"""How a device computes the fused linear operators: its routes are asked in turn, the reference is the last.

A route is a module of kernels.  It says by layout, shapes and dtypes what it multiplies; a stored weight that none
does is decoded, once for the product, and the routes are asked again for the dense one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from rewrite.codegen.cpu import nf4 as cpu_nf4
from rewrite.codegen.cpu import operators as cpu_operators
from rewrite.codegen.kernels import linear, nf4_linear

Tensor = torch.Tensor


class Route(Protocol):
    """The arguments are those of `rewrite::adapted_linear_core` and of `rewrite::linear_input_gradient`.

    One look at the arguments answers both whether a route computes a call, and by which kernel.
    """

    def product(self, x: Tensor, weight: Sequence[Tensor], layout: str, *rest: Any) -> Tensor | str:
        """`x W' + bias + sum of scale * h B'`, (..., d_out); or why the route does not compute it."""
        ...

    def input_gradient(self, dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor | str:
        """`dy W`, (..., d_in); or why the route does not compute it."""
        ...


ROUTES: dict[str, tuple[Route, ...]] = {"cpu": (cpu_operators,), "cuda": (nf4_linear, linear)}
"""The routes of each type of device; the first that takes a product computes it."""


def product(x: Tensor, weight: Sequence[Tensor], layout: str, *rest: Any) -> Tensor | None:
    """A fused product by a route of the device, None where only the reference computes it."""
    for route in ROUTES[x.device.type]:
        if not isinstance(found := route.product(x, weight, layout, *rest), str):
            return found
    return None


def input_gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor | None:
    """The gradient of a frozen linear layer's input by a route, None where only the reference computes it."""
    for route in ROUTES[dy.device.type]:
        if not isinstance(found := route.input_gradient(dy, weight, layout), str):
            return found
    return None


_STORED = {("nf4", "cpu"): cpu_nf4.route, ("nf4", "cuda"): nf4_linear.route}


def of_storage(kind: str, device: str) -> str:
    """What computes with weights of a storage format on a type of device, and why not kernels where it is not them.

    >>> of_storage("dense", "cpu")
    'PyTorch operators'
    """
    found = _STORED.get((kind, device))
    return found() if found else "PyTorch operators"
