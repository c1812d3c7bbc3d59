"""Which layer map a module has: by its type and settings, or by the operator that reads its weight in an export.

A module whose call does more than its map (a scaled embedding, say) is not told apart here: that takes a trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from rewrite.codegen.maps import LINEAR, Convolution, LayerMap, Lookup, Matmul

aten = torch.ops.aten


def layer_of(module: nn.Module) -> LayerMap:
    """The map of a module with a `weight`; `LINEAR` for one of no known kind.

    >>> layer_of(nn.Embedding(100, 8, padding_idx=0))
    Lookup(padding_idx=0, scale_grad_by_freq=False)
    """
    if isinstance(module, nn.Embedding):
        return Lookup(module.padding_idx, module.scale_grad_by_freq)
    if isinstance(module, nn.modules.conv._ConvNd):
        return Convolution(
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
            transposed=module.transposed,
            output_padding=tuple(module.output_padding),
            padding_mode=module.padding_mode,
        )
    return Matmul(True) if is_conv1d(type(module)) else LINEAR


def is_conv1d(cls: type) -> bool:
    """Whether a class is transformers' `Conv1D`: a linear layer that stores its weight as (d_in, d_out)."""
    return cls.__name__ == "Conv1D"


_CONVOLUTIONS = {
    overload: dims
    for dims, packets in {
        1: (aten.conv1d, aten.conv_transpose1d),
        2: (aten.conv2d, aten.conv_transpose2d),
        3: (aten.conv3d, aten.conv_transpose3d),
    }.items()
    for packet in packets
    for overload in (getattr(packet, name) for name in packet.overloads())
}


def layer_of_reader(node: fx.Node) -> LayerMap | None:
    """The map of the layer whose weight an ATen node of an exported program reads; None if it is no such node.

    Padding modes other than zeros are nodes of their own there, and not part of the map.
    """
    if node.target is aten.embedding.default:
        given = _arguments(node)
        padding = given["padding_idx"]
        return Lookup(None if padding == -1 else padding, given["scale_grad_by_freq"])
    if node.target not in _CONVOLUTIONS:
        return None
    dims, given = _CONVOLUTIONS[node.target], _arguments(node)
    padding = given["padding"]
    return Convolution(
        kernel=tuple(given["weight"].meta["val"].shape[2:]),
        stride=_each(given["stride"], dims),
        padding=padding if isinstance(padding, str) else _each(padding, dims),
        dilation=_each(given["dilation"], dims),
        groups=given["groups"],
        transposed="output_padding" in given,
        output_padding=_each(given.get("output_padding", 0), dims),
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen node by name, with the defaults of those that it leaves out."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {a.name: a.default_value for a in schema.arguments} | given | dict(node.kwargs)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A setting for every dimension: ATen repeats a single number."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return numbers * dims if len(numbers) == 1 else numbers
