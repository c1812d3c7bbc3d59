"""Remembers what was done to each captured graph, so that `explain`, `diff` and `report` can find it by model.

A graph is tied to a model by the adapter tensors that it reads, held weakly: no owner to keep alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from rewrite.passes.record import GraphRecord

_captures: list[tuple[GraphRecord, list[weakref.ref[torch.Tensor]]]] = []


def remember(record: GraphRecord, tensors: Iterable[torch.Tensor]) -> None:
    """Keep a record as long as one of its tensors lives."""
    _captures[:] = [c for c in _captures if any(ref() is not None for ref in c[1])]
    _captures.append((record, [weakref.ref(t) for t in tensors]))


def records_of(model: nn.Module) -> list[GraphRecord]:
    """The graphs captured from `model` (or a part of it), oldest first."""
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    return [record for record, refs in _captures if any(id(t) in own for ref in refs if (t := ref()) is not None)]


def forget(model: nn.Module) -> None:
    """Drop the records of a model."""
    gone = {id(r) for r in records_of(model)}
    _captures[:] = [c for c in _captures if id(c[0]) not in gone]
