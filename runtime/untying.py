"""Gives an adapted module a weight of its own where it shares one, by the user's word, so that it can be merged.

A weight that all its modules see adapted (one adapter for all of them) stays shared and never comes here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from rewrite.errors import RewriteError
from rewrite.runtime.attach import original
from rewrite.runtime.graft import Graft

_FLAG = "tie_word_embeddings"  # of transformers' configs: ties weights again when a saved model is loaded
Tied = Mapping[tuple[str, str], tuple[Graft, tuple[tuple[str, str], ...]]]
"""(module, tensor) of an adapted weight -> (a graft of it, the same of those that share it and are not adapted so)."""


def check(model: nn.Module, tied: Tied, untie: bool, grafts: Sequence[Graft]) -> None:
    """Raise `RewriteError` unless the shared weights may, and can, be parted."""
    graft, others = next(iter(tied.values()))
    names = ", ".join(path for path, _ in others)
    what = f"cannot merge {graft.label} at {graft.path}: its {graft.tensor} is shared with {names}"
    if any(g.sharers and (path, g.tensor) in tied for g in grafts for path in g.places):
        raise RewriteError(f"{what}, and one adapter stands on it for all of them. Nothing was merged")
    if not untie:
        raise RewriteError(
            f"{what}, which would change too. Nothing was merged: rewrite.merge(model, untie=True) gives "
            f"{graft.path} a {graft.tensor} of its own"
        )
    forward: Any = inspect.unwrap(type(model).forward)
    if any(getattr(config, _FLAG, False) for config in _configs(model)) and _FLAG in forward.__code__.co_names:
        raise RewriteError(
            f"{what}, and {type(model).__name__} computes something else when it is not ({_FLAG}). Nothing was merged"
        )


def untie(model: nn.Module, tied: Tied, requires_grad: Mapping[str, bool]) -> dict[str, bool]:
    """Give each of the modules a copy of its weight; returns by name whether weights are to train afterwards."""
    flags: dict[str, bool] = {}
    left: dict[int, set[tuple[str, str]]] = {}  # who still shares a weight
    for place, (_, others) in tied.items():
        module, tensor = model.get_submodule(place[0]), place[1]
        shared = original(module, tensor)
        assert shared is not None
        names = [".".join(filter(None, user)) for user in (place, *others)]  # of which only one had a flag
        flags |= dict.fromkeys(names, any(requires_grad.get(name, False) for name in names))
        users = left.setdefault(id(shared), {place, *others})
        if len(users) == 1:
            continue
        users.remove(place)
        own = nn.Parameter(shared.detach().clone(), requires_grad=False)
        if tensor in module._parameters:
            module._parameters[tensor] = own
        else:
            held: Any = module._modules["parametrizations"]
            held[tensor].original = own
    for config in _configs(model):
        if getattr(config, _FLAG, False):
            setattr(config, _FLAG, False)
    return flags


def _configs(model: nn.Module) -> Iterator[Any]:
    """The config of a Hugging Face model, and those of its parts."""
    for module in model.modules():
        if (config := module.__dict__.get("config")) is not None:
            yield config
