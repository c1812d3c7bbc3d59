"""What a captured graph was captured for: the model's inputs, without parameters, buffers and numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewrite.passes.counting import hint


def inputs_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """The tensor inputs of a Dynamo graph as `name dtype[sizes]`; symbolic sizes as the numbers they stand for.

    E.g. `("input_ids int64[2, 9]", "labels int64[2, 9]")`.
    """
    found = []
    for node in gm.graph.nodes:
        argument: Any = node.meta.get("grapharg") if node.op == "placeholder" else None
        value = node.meta.get("example_value")
        if argument is None or argument.pass_arg_as_tensor or not isinstance(value, torch.Tensor):
            continue
        if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):  # a parameter or a buffer
            continue
        name = str(node.target).removeprefix("L_").removeprefix("kwargs_").strip("_")
        sizes = ", ".join(str(hint(s)) for s in value.shape)
        found.append(f"{name} {str(value.dtype).removeprefix('torch.')}[{sizes}]")
    return tuple(found)
