"""What a model computes, from one recorded forward: which parameter plays which role, whatever it is called.

`trace` records, `flow` asks the graph, `attention` and `feedforward` find their patterns, `roles` names the parts.
`of` is all of it in one call.
"""

from __future__ import annotations

import weakref

from torch import nn

from rewrite.structure.inputs import Inputs
from rewrite.structure.roles import Structure, derive
from rewrite.structure.trace import TraceError, record

_known: weakref.WeakKeyDictionary[nn.Module, tuple[object, Structure]] = weakref.WeakKeyDictionary()


def of(model: nn.Module, batch: Inputs | None, blocks: tuple[str, ...]) -> Structure:
    """The structure of a model, from one forward on `batch` (or on one that is made for it) under fake tensors.

    Raises `TraceError` where no forward could be recorded.  What was found is kept as long as the model is the same.
    """
    same = _signature(model)
    if batch is None and model in _known and _known[model][0] == same:
        return _known[model][1]
    traced = record(model, batch)
    try:
        found = derive(traced, blocks)
    except Exception as error:  # of a graph unlike any other; names are left to go by, and the plan says so
        raise TraceError(f"its graph could not be read, {type(error).__name__}: {error}") from error
    _known[model] = same, found
    return found


def _signature(model: nn.Module) -> tuple[object, ...]:
    modules = tuple((path, type(m), len(m._forward_hooks)) for path, m in model.named_modules(remove_duplicate=False))
    return modules, tuple((n, id(p), p.shape) for n, p in model.named_parameters(remove_duplicate=False))


__all__ = ["Inputs", "Structure", "TraceError", "derive", "of"]
