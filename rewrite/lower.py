"""From placements to grafts: every derived behaviour of a method comes from its one view, here.

A typed function is made once per (method, layout of its tensors), so that all sites of a clause, and all copies
of a model, share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import rewrite.codegen.ops  # noqa: F401  (defines torch.ops.rewrite)
from rewrite.codegen.maps import LayerMap, Matmul, Rows
from rewrite.codegen.typed import typed
from rewrite.method import Method, Param
from rewrite.planning import Placement, Plan
from rewrite.runtime.graft import Graft, Slot
from rewrite.sites import Site

Tensor = torch.Tensor


def grafts(plan: Plan) -> list[Graft]:
    """The grafts of a plan, in its order."""
    return [lower(placement) for placement in plan.placements]


def lower(placed: Placement) -> Graft:
    """One placement as a graft."""
    site, method = placed.site, placed.method
    common: dict[str, Any] = {
        "path": site.path,
        "name": placed.name,
        "tensor": site.place.tensor,
        "shape": site.place.stored,
        "map": site.place.map,
        "rows": site.rows,
        "label": str(placed.clause.call).removesuffix("()"),
    }
    return _LOWER[method.view()](method, site, common)


def _delta(method: Method, site: Site, common: dict[str, Any]) -> Graft:
    params = method.params(site)
    names = tuple(params)
    make, where = (_branch, "output") if site.place.called else (_updated, "weight")
    return Graft(
        where=where,
        op=make(method, names, site.rows, site.place.map),
        slots=_slots(params, site.dtype),
        initialise=functools.partial(_initialise, method, params),
        delta=functools.partial(_structured, method, names),
        sharers=site.place.tied if site.shared else (),
        **common,
    )


def _output(method: Method, site: Site, common: dict[str, Any]) -> Graft:
    params = method.params(site)
    return Graft(
        where="output",
        op=_activation(method, tuple(params), site.rows, site.place.map),
        slots=_slots(params, site.dtype),
        initialise=functools.partial(_initialise, method, params),
        **common,
    )


def _weight(method: Method, site: Site, common: dict[str, Any]) -> Graft:
    params = method.params(site)
    names = tuple(params)
    return Graft(
        where="weight",
        op=_reparametrised(method, names, site.rows, site.place.map),
        slots=_slots(params, site.dtype),
        initialise=functools.partial(_initialise, method, params),
        sharers=site.place.tied if site.shared else (),
        **common,
    )


def _storage(method: Method, site: Site, common: dict[str, Any]) -> Graft:
    whole = {**common, "rows": None}
    return Graft(
        where="storage",
        op=_stored(method.name, str(method.layout(site))),
        encode=method.encode,
        read=method.read,
        **whole,
    )


def _train(method: Method, site: Site, common: dict[str, Any]) -> Graft:
    slots = {name: Slot(shape, site.dtype) for name, shape in site.place.tensors}
    return Graft(where="train", slots=slots, **common)


_LOWER: dict[str, Callable[[Method, Site, dict[str, Any]], Graft]] = {
    "delta": _delta,
    "output": _output,
    "weight": _weight,
    "storage": _storage,
    "train": _train,
}


def _slots(params: dict[str, Param], base: torch.dtype) -> dict[str, Slot]:
    # Adapters of a half-precision base train in float32; they are cast down in the graph, activations never up.
    dtype = torch.float32 if base.itemsize < 4 else base
    return {name: Slot(p.shape, dtype, p.trainable) for name, p in params.items()}


def _initialise(method: Method, params: dict[str, Param], W: Tensor) -> dict[str, Tensor]:
    dtype = torch.float32 if W.dtype.itemsize < 4 else W.dtype
    theta = {name: torch.empty(p.shape, dtype=dtype, device=W.device) for name, p in params.items()}
    for name, param in params.items():
        param.init(theta[name])
    method.initialise(W.to(dtype), theta)
    return theta


def _structured(method: Method, names: tuple[str, ...], *theta: Tensor) -> Any:
    return method.delta(**dict(zip(names, theta, strict=True)))


@functools.cache
def _branch(method: Method, names: tuple[str, ...], rows: Rows | None, layer: LayerMap) -> Callable[..., Any]:
    """`y + delta(theta).apply(dropout(x))`, on the rows of the site."""
    dropout = getattr(method, "dropout", 0.0)

    def reference(x: Any, y: Any, *theta: Any, training: bool) -> Any:
        x = F.dropout(x, dropout, training) if dropout and training else x
        like = y if layer.reads_ids else None
        for term in _structured(method, names, *theta).terms():
            if rows is None:
                update = term.apply(x, layer, like=like)
            elif rows.count == 1 and isinstance(layer, Matmul):  # the fused operator writes those columns alone
                update = rows.put(term.apply(x, layer, like=like), layer.channel)
            else:
                update = term.spread(rows).apply(x, layer, like=like)
            y = y + update
        return y

    return typed(method.name, "branch", reference)


@functools.cache
def _updated(method: Method, names: tuple[str, ...], rows: Rows | None, layer: LayerMap) -> Callable[..., Any]:
    """`W + delta(theta)`, on the rows of the site: for a weight that is read without calling its layer."""

    def reference(W: Any, *theta: Any) -> Any:
        return _structured(method, names, *theta).add_to(W, layer, rows)

    return typed(method.name, "weight", reference)


@functools.cache
def _activation(method: Method, names: tuple[str, ...], rows: Rows | None, layer: LayerMap) -> Callable[..., Any]:
    def reference(x: Any, y: Any, *theta: Any, training: bool) -> Any:
        named = dict(zip(names, theta, strict=True))
        if rows is None:
            return method.output(x, y, **named)
        part = method.output(x, rows.take(y, layer.channel), **named)
        return rows.replace(y, part, layer.channel)

    return typed(method.name, "branch", reference)


@functools.cache
def _reparametrised(method: Method, names: tuple[str, ...], rows: Rows | None, layer: LayerMap) -> Callable[..., Any]:
    def reference(W: Any, *theta: Any) -> Any:
        named, matrix = dict(zip(names, theta, strict=True)), layer.matrix(W)
        if rows is None:
            changed = method.weight(matrix, **named)
        else:
            changed = rows.replace(matrix, method.weight(rows.take(matrix), **named))
        return layer.stored(changed, W.shape)

    return typed(method.name, "weight", reference)


@functools.cache
def _stored(name: str, layout: str) -> Callable[..., Any]:
    def reference(*stored: Any) -> Any:
        return torch.ops.rewrite.decode(list(stored), layout)

    return typed(name, "storage", reference)
