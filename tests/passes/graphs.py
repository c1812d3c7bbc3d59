"""Graphs for the tests of passes: a function captured by Dynamo, with sites, as the runtime hands them over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rewrite.passes.record import GraphRecord
from rewrite.runtime.capture import copy_graph


def capture(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The graph of `function` (or module) on `args`, copied as the backend copies it."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(copy_graph(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True, dynamic=False)(*args)
    return graphs[-1]


def inputs(gm: fx.GraphModule) -> list[torch.Tensor]:
    """The real tensors behind a captured graph's inputs, in order."""
    return [n.meta["grapharg"].example for n in gm.graph.nodes if n.op == "placeholder"]


def record() -> GraphRecord:
    return GraphRecord("test")
