"""The tensors of an adapted model under the names that they have in PEFT's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.method import Method
from rewrite.peft.tuner import Key, Part, Tuner, method_of, part_of, tuner_for
from rewrite.runtime.attach import adapter_of, require
from rewrite.runtime.graft import Graft

Tensor = torch.Tensor


ROWS = "TRAINABLE_TOKENS"
Made = tuple[Graft, Method, Tuner, Part]


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in a file, the graft and the slot that hold it, and how the two are alike."""

    name: str
    graft: Graft
    key: Key
    part: Part | None = None
    method: Method | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has in a file."""
        slot = self.graft.slots[self.key.slot]
        return tuple(self.key.written(torch.empty(slot.held, device="meta")).shape)


def parts(model: nn.Module, grafts: Sequence[Graft]) -> list[Made]:
    """What PEFT's files could hold of these grafts; raises `RewriteError` for methods that PEFT does not have."""
    found = []
    for graft in grafts:
        if graft.where in ("train", "storage"):  # base tensors: of no tuner; the storage is not of the adapter
            continue
        method = method_of(graft)
        tuner = tuner_for(method.name)
        if tuner is None:
            raise RewriteError(f"PEFT has no file for {graft.label} at {graft.path}: rewrite.save keeps every adapter")
        if graft.rows is not None:
            raise RewriteError(
                f"{graft.label} is on a part of {graft.path}: PEFT adapts whole weights; rewrite.save keeps it"
            )
        part = part_of(model, graft, grafts)
        if part.kind not in (*tuner.kinds, "attention.out" if "attention" in tuner.kinds else ""):
            raise RewriteError(f"PEFT's {tuner.type} does not adapt {graft.path}.{graft.tensor}: rewrite.save keeps it")
        if (reason := tuner.fits(method, part)) is not None:
            raise RewriteError(f"{graft.label} at {graft.path} has no PEFT file: {reason}")
        found.append((graft, method, tuner, part))
    if len({tuner.type for _, _, tuner, _ in found}) > 1:  # rows of an embedding go with another method
        found = [(g, m, t, _inside(p) if t.type == ROWS else p) for g, m, t, p in found]
    return found


def _inside(part: Part) -> Part:
    return replace(part, prefix=f"{part.prefix}token_adapter.")


def zeros_of(made: Sequence[Made]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file that are zero whatever the adapter, by name and shape."""
    return {
        f"base_model.model.{part.prefix}{name}": shape
        for _, method, tuner, part in made
        for name, shape in tuner.constants(method, part).items()
    }


def entries(model: nn.Module, grafts: Sequence[Graft]) -> list[Entry]:
    """Every tensor of an adapter in PEFT's files."""
    made = parts(model, grafts)
    found = [
        Entry(key.full(part), graft, key, part, method)
        for graft, method, tuner, part in made
        for key in tuner.keys(method, part)
    ]
    wrapped = {part.path: part for _, _, tuner, part in made if tuner.type != ROWS}
    tuned = tuned_paths(grafts) if not made else frozenset()
    for graft in grafts:
        if graft.where == "train":
            # The base tensors of a layer that PEFT wraps stand one deeper.
            inner = wrapped[graft.path].prefix + "base_layer." if graft.path in wrapped else f"{graft.path}."
            inner += "ln_tuning_layers." if graft.path in tuned else ""
            found += [Entry(f"base_model.model.{inner}{name}", graft, Key(name, name)) for name in graft.slots]
    return list({entry.name: entry for entry in found}.values())


def tuned_paths(grafts: Sequence[Graft]) -> frozenset[str]:
    """The modules of an adapter of trained modules alone that LN_TUNING holds: those of `norm`, or else all."""
    trained = [graft for graft in grafts if graft.where == "train"]
    norms = frozenset(graft.path for graft in trained if graft.label.startswith("norm"))
    return norms or frozenset(graft.path for graft in trained)


def tensor_of(model: nn.Module, entry: Entry) -> Tensor:
    """The tensor that an entry names, as the model holds it."""
    return tensors_of(model, entry.graft)[entry.key.slot]


def tensors_of(model: nn.Module, graft: Graft) -> dict[str, Tensor]:
    """The tensors of a graft by slot, as the model holds them."""
    module = model.get_submodule(graft.path)
    if graft.where == "train":
        return {name: module.get_parameter(name) for name in graft.slots}
    adapter = adapter_of(module, graft)
    return {name: getattr(adapter, name) for name in graft.slots}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every trained tensor of an adapted model as `(name in a PEFT checkpoint, parameter)`.

    Where a file has the numbers in another shape, the parameter is an `AsInPeft`: a view of ours whose `.grad` is ours
    in that shape too, before and after a backward pass.  Raises `RewriteError` for adapters that PEFT cannot hold.

    Example: `{name: p.grad for name, p in rewrite.peft.named_parameters(model)}`
    """
    for entry in entries(model, require(model).grafts):
        value = tensor_of(model, entry)
        if isinstance(value, nn.Parameter) and value.requires_grad and not entry.key.optional:
            yield entry.name, value if entry.key.peft is None else AsInPeft.of(value, entry.key)


class AsInPeft(nn.Parameter):
    """A parameter of ours as PEFT's files have it.

    `.grad` reads and writes the gradient of ours.  The values are a view of ours, and so an optimizer can step on it,
    but for stacks of experts, whose order in a file takes a copy.
    """

    @staticmethod
    def of(source: nn.Parameter, key: Key) -> AsInPeft:
        """`source` under a key of a file."""
        with torch.no_grad():
            found: Any = torch.Tensor._make_subclass(AsInPeft, key.written(source.detach()), True)
        found.source, found.key = source, key
        return found

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the parameter that this is a view of."""
        source: Any = self.source  # type: ignore[attr-defined]
        return None if source.grad is None else self.key.written(source.grad)  # type: ignore[attr-defined]

    @grad.setter
    def grad(self, value: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        source: Any = self.source  # type: ignore[attr-defined]
        source.grad = None if value is None else self.key.read(value)  # type: ignore[attr-defined]
