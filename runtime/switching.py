"""use: which of a model's named adapters take part, how much, and for which rows of a batch.

Every named adapter has a gate, a tensor that compiled graphs take as an input: switching changes numbers, not graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from rewrite.errors import RewriteError, nearest
from rewrite.runtime.adapter import Adapter
from rewrite.runtime.attach import Attachment, adapter_of, require
from rewrite.runtime.graft import Graft

Choice = str | Mapping[str, float] | None
"""An adapter by name, several with their weights, or none: the base alone."""


@torch.no_grad()
def use(model: nn.Module, which: Choice = None, *, per_row: Sequence[Choice] | None = None) -> nn.Module:
    """Let the adapter `which` (a name, or names with weights; None is the base alone) take part, and no other.

    `per_row` chooses for every row of the batch instead; the next batches must have that many rows.  Adapters have
    names where the spec gives them, `en: lora(r=8)@attn + fr: lora(r=8)@attn`; all of them take part until this is
    called, and those without a name always do.  Switching never recompiles (a first `per_row` does once), and inactive
    adapters get zero gradients: give an optimizer those that train, `parameter_groups(model, lr=1e-4, adapter="en")`.

    Raises `RewriteError` for an unknown name, unnamed adapters, and adapters that cannot differ by rows.

    Example: `rewrite.use(model, {"en": 0.7, "fr": 0.3})`
    """
    state = require(model)
    known = names(state)
    if which is not None and per_row is not None:
        raise RewriteError("use(model, which) or use(model, per_row=[...]): not both")
    choices = [_weights(choice, known) for choice in ([which] if per_row is None else per_row)]
    if not known or (which is None and per_row is None):
        _check_named(state)
    held = list(_gated(model, state))
    if per_row is not None:
        _check_rows(held)
    for graft, adapter in held:
        values = [choice.get(str(graft.adapter), 0.0) for choice in choices]
        _set(adapter, values[0] if per_row is None else values)
    return model


def names(state: Attachment) -> tuple[str, ...]:
    """The names of a model's adapters, in the order of the spec."""
    return tuple(dict.fromkeys(g.adapter for g in state.grafts if g.adapter))


def in_use(model: nn.Module) -> dict[str, float | list[float]]:
    """The weight of every named adapter as it is now; a list where it differs by rows."""
    return {str(graft.adapter): adapter.gate.tolist() for graft, adapter in _gated(model, require(model))}  # type: ignore[operator]


def _gated(model: nn.Module, state: Attachment) -> Iterator[tuple[Graft, Adapter]]:
    for graft in state.grafts:
        if graft.adapter and graft.where not in ("train", "storage"):
            yield graft, adapter_of(model.get_submodule(graft.path), graft)


def _check_named(state: Attachment) -> None:
    """The base alone is what is left when every adapter has a gate."""
    unnamed = next((g for g in state.grafts if g.where != "storage" and not g.adapter), None)
    if unnamed is not None:
        raise RewriteError(
            f"{unnamed.label} has no name, so it is always in use: name it in the spec, 'en: {unnamed.label}@...', "
            "or take it off with rewrite.remove(model)"
        )


def _weights(choice: Choice, known: Sequence[str]) -> Mapping[str, float]:
    found = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
    for name in found:
        if name not in known:
            close = nearest(name, known, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(known)}"
            raise RewriteError(f"this model has no adapter '{name}': {hint}")
    return found


def _check_rows(held: Sequence[tuple[Graft, Adapter]]) -> None:
    dense = [g for g, _ in held if g.where == "weight"]
    if dense:
        places = ", ".join(dict.fromkeys(f"{g.label} at {g.path}" for g in dense[:3]))
        raise RewriteError(f"rows cannot use different weights of one layer: {places} rewrites the weight itself")


def _set(adapter: Adapter, value: float | list[float]) -> None:
    gate = torch.as_tensor(value, dtype=adapter.gate.dtype, device=adapter.gate.device)  # type: ignore[arg-type]
    if gate.shape == adapter.gate.shape:  # in place: captured CUDA graphs read this address
        adapter.gate.copy_(gate)  # type: ignore[operator]
    else:
        adapter.gate = gate
