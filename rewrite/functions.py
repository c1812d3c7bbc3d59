"""What a method computes at a kind of site, derived from its one view: typed functions for graphs, and merged weights.

Each is made once per method, layout of its tensors, rows and layer, so that all sites of a clause, and all copies of a
model, share it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import rewrite.codegen.dropout
import rewrite.codegen.ops  # noqa: F401  (they define torch.ops.rewrite)
from rewrite.codegen.forms import Base, Dense, Form, Formed
from rewrite.codegen.maps import LayerMap, Matmul, Rows
from rewrite.codegen.typed import typed
from rewrite.method import Method, update

Tensor = torch.Tensor


@dataclass(frozen=True)
class Here:
    """A method as it stands at a kind of site; typed functions are shared by all that are equal."""

    method: Method
    names: tuple[str, ...]
    rows: Rows | None
    layer: LayerMap
    gated: bool
    shape: tuple[int, int] = (0, 0)  # of the matrix, (d_out, d_in), where the method asks for it

    def update(self, named: dict[str, Any]) -> Form:
        """The update that the method states there."""
        return update(self.method, named, self.shape)

    def split(self, theta: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
        """(tensors by name, gate or None) of what a typed function is called with."""
        gate = theta[len(self.names)] if self.gated else None
        return dict(zip(self.names, theta, strict=False)), gate


def _dropped(method: Method, x: Any, training: bool) -> Any:
    p = getattr(method, "dropout", 0.0)
    return torch.ops.rewrite.dropout(x, torch.ops.rewrite.draw(x), p) if p and training else x


def _aligned(gate: Any, y: Any = None) -> Any:
    """The gate of an adapter so that it multiplies an output y: one number, or one a row of the batch."""
    return gate.view(-1, *(1,) * (y.ndim - 1)) if y is not None and gate.ndim else gate.reshape(-1)


def _between(old: Any, new: Any, gate: Any) -> Any:
    """`old` where the gate is 0, `new` where it is 1."""
    return new if gate is None else old + (new - old) * _aligned(gate, old).to(old.dtype)


@functools.cache
def branch(here: Here, factored: bool) -> Callable[..., Any]:
    """`y + delta(theta).apply(dropout(x))`, on the rows of the site."""
    method, rows, layer = here.method, here.rows, here.layer

    def reference(x: Any, y: Any, *theta: Any, training: bool) -> Any:
        named, gate = here.split(theta)
        x = _dropped(method, x, training)
        like = y if layer.reads_ids else None
        for term in here.update(named).terms():
            term = term if factored or term.shift() is not None else Formed(term)
            term = term if gate is None else term.gated(_aligned(gate, y))
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
def updated(here: Here) -> Callable[..., Any]:
    """`W + delta(theta)`, on the rows of the site: for a weight that is read without calling its layer."""

    def reference(W: Any, *theta: Any) -> Any:
        named, gate = here.split(theta)
        form = here.update(named)
        return (form if gate is None else form.gated(_aligned(gate))).add_to(W, here.layer, here.rows)

    return typed(here.method.name, "weight", reference)


@functools.cache
def rewritten_branch(here: Here, factored: bool) -> Callable[..., Any]:
    """`weight(W) x + bias(b)` in place of y, which nothing else has changed yet."""
    method, layer = here.method, here.layer

    def reference(x: Any, y: Any, W: Any, b: Any, *theta: Any, training: bool) -> Any:
        named, gate = here.split(theta)
        W = layer.matrix(W)
        W = W if W.dtype == x.dtype else W.to(x.dtype)
        base = Base(W, x, y if b is None else None)
        form = _as_form(method.weight(base, **named))
        dropped, shift = _dropped(method, x, training), method.shifted(W, b, **named)
        if dropped is x:
            found = (form if factored else Formed(form)).apply(x, layer)
            found = found if shift is None else found + shift.to(found.dtype)
        else:  # dropout is of the branch: of what the method adds to the base
            update, found = form.less(base), y
            for term in (update if factored else Formed(update)).terms():
                found = found + term.apply(dropped, layer)
            if shift is not None and shift is not b:
                found = found + (shift.to(found.dtype) if b is None else (shift - b).to(found.dtype))
        return _between(y, found, gate)

    return typed(method.name, "branch", reference)


@functools.cache
def activation(here: Here) -> Callable[..., Any]:
    method, rows, layer = here.method, here.rows, here.layer

    def reference(x: Any, y: Any, *theta: Any, training: bool) -> Any:
        named, gate = here.split(theta)
        whole = y.movedim(layer.channel, -1) if layer.channel != -1 else y
        part = whole if rows is None else rows.take(whole, -1)
        named = {n: t.to(y.dtype) if t.dtype.is_floating_point else t for n, t in named.items()}
        new = method.output(_dropped(method, x, training), part, **named)
        new = new if rows is None else rows.replace(whole, new, -1)
        new = new.movedim(-1, layer.channel) if layer.channel != -1 else new
        return _between(y, new, gate)

    return typed(method.name, "branch", reference)


@functools.cache
def fed(here: Here) -> Callable[..., Any]:
    method, layer = here.method, here.layer

    def reference(x: Any, *theta: Any, training: bool) -> Any:
        named, gate = here.split(theta)
        last = x.movedim(layer.channel, -1) if layer.channel != -1 else x
        new = method.input(_dropped(method, last, training), **named)
        new = new.movedim(-1, layer.channel) if layer.channel != -1 else new
        return _between(x, new, gate)

    return typed(method.name, "branch", reference)


@functools.cache
def virtual(here: Here) -> Callable[..., Any]:
    """The virtual tokens, or the keys and values, that a method puts in front of what a model reads."""
    method = here.method

    def reference(*theta: Any, training: bool) -> Any:
        named, _ = here.split(theta)
        return getattr(method, method.view())(**named)

    return typed(method.name, "tokens", reference)


@functools.cache
def tapped(here: Here) -> Callable[..., Any]:
    """What a side network sees of a stream."""
    method, names = here.method, here.names

    def reference(h: Any, *theta: Any) -> Any:
        return method.tap(h, **dict(zip(names, theta, strict=True)))

    return typed(method.name, "branch", reference)


@functools.cache
def joined(here: Here) -> Callable[..., Any]:
    """A stream that a side network has joined."""

    def reference(y: Any, s: Any, *theta: Any) -> Any:
        named, gate = here.split(theta)
        return _between(y, here.method.join(y, s, **named), gate)

    return typed(here.method.name, "branch", reference)


def asked(view: Callable[..., Any], given: Iterable[str]) -> tuple[str, ...]:
    """Those of the given tensors that a view of a method takes."""
    wanted = inspect.signature(view).parameters
    return tuple(name for name in given if name in wanted)


@functools.cache
def reparametrised(here: Here) -> Callable[..., Any]:
    def reference(W: Any, *theta: Any) -> Any:
        named, gate = here.split(theta)
        return _between(W, _rewritten(here, W, named), gate)

    return typed(here.method.name, "weight", reference)


def _rewritten(here: Here, W: Any, named: dict[str, Any]) -> Any:
    """A stored weight as the method rewrites it, on the rows of the site."""
    matrix, rows = here.layer.matrix(W), here.rows
    part = matrix if rows is None else rows.take(matrix)
    new = _as_form(here.method.weight(Base(part), **named)).materialise()
    new = new if new.dtype == W.dtype else new.to(W.dtype)
    return here.layer.stored(new if rows is None else rows.replace(matrix, new), W.shape)


def _as_form(value: Any) -> Form:
    return value if isinstance(value, Form) else Dense(value)


@functools.cache
def stored(name: str, layout: str) -> Callable[..., Any]:
    def reference(*stored: Any) -> Any:
        return torch.ops.rewrite.decode(list(stored), layout)

    return typed(name, "storage", reference)


# --- merged weights ---

Merged = Callable[..., tuple[Any, Any]]
"""(stored weight, bias or None, *tensors) -> the weight and bias of a plain layer that computes the same."""


def merged(here: Here) -> Merged | None:
    """How the method merges at such a site; None where it has no merged form."""
    view = here.method.view()
    if view in ("tokens", "past", "side") or (view in ("output", "input") and not here.method.pointwise):
        return None
    return functools.partial(_MERGED[view], here)


def _merged_delta(here: Here, W: Any, b: Any, *theta: Any) -> tuple[Any, Any]:
    named, gate = here.split(theta)
    form, rows, layer = here.update(named), here.rows, here.layer
    form = form if gate is None else form.gated(_aligned(gate))
    dense, shift = form.materialise(), form.shift()
    if dense.ndim:  # of a shift alone it is a plain zero
        W = W + layer.stored(dense if rows is None else rows.put(dense), W.shape)
    if shift is None:
        return W, b
    shift = shift if rows is None else rows.put(shift, -1)
    if not layer.biased:
        return W + layer.stored(shift[:, None], W.shape), b
    return W, shift if b is None else b + shift


def _merged_weight(here: Here, W: Any, b: Any, *theta: Any) -> tuple[Any, Any]:
    named, gate = here.split(theta)
    shift = here.method.shifted(Base(here.layer.matrix(W)), b, **named)
    if gate is not None and shift is not None:
        shift = shift * gate if b is None else b + (shift - b) * gate
    return _between(W, _rewritten(here, W, named), gate), shift


def _merged_output(here: Here, W: Any, b: Any, *theta: Any) -> tuple[Any, Any]:
    """y -> a y + c, channel by channel: a and c are what it makes of zeros and ones."""
    named, gate = here.split(theta)
    rows, layer = here.rows, here.layer
    count = layer.outputs(layer.matrix_shape(W.shape)[-2]) if W.ndim > 1 else W.shape[0]
    zeros = torch.zeros(count if rows is None else len(rows), dtype=W.dtype, device=W.device)
    c = here.method.output(zeros, zeros, **named)
    a = here.method.output(zeros, zeros + 1, **named) - c
    if rows is not None:
        whole = torch.ones(count, dtype=W.dtype, device=W.device)
        a, c = rows.replace(whole, a, -1), rows.put(c, -1)
    if gate is not None:
        a, c = 1 + (a - 1) * gate, c * gate
    W = layer.scaled(W, a)
    if not layer.biased:
        return W + layer.stored(c[:, None], W.shape), b
    if b is None:
        return W, c if bool(c.any()) else None
    return W, a * b + c


def _merged_input(here: Here, W: Any, b: Any, *theta: Any) -> tuple[Any, Any]:
    """x -> a x, channel by channel: the columns of W by a."""
    named, gate = here.split(theta)
    a = here.method.input(torch.ones(here.layer.inputs(W.shape), dtype=W.dtype, device=W.device), **named)
    a = a if gate is None else 1 + (a - 1) * gate
    return here.layer.scaled_inputs(W, a), b


_MERGED: dict[str, Merged] = {
    "delta": _merged_delta,
    "weight": _merged_weight,
    "output": _merged_output,
    "input": _merged_input,
}
