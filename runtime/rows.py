"""Rows of our own through the layers of a block: queries that nobody else sees, to the keys and values of the block.

The block has run already; only the new rows are computed.  What they need of its stream, its keys and values, does not
depend on them: so nothing of the stream is in a backward pass.  (A compiled step computes these once, for both.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rewrite.errors import RewriteError
from rewrite.runtime.graft import Graft, Wiring

Tensor = torch.Tensor
TOLERANCE = 1e-9  # of float64
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass
class Rows:
    """The layers of one block, with its input x (rows, tokens, width) in one forward."""

    wiring: Wiring
    layers: Mapping[str, nn.Module]
    x: Tensor
    mask: Tensor | None = None

    def through(self, new: Tensor) -> Tensor:
        """What the block makes of new rows (rows, count, width) that see its stream, and nobody sees."""
        pre = self.wiring.pre
        first, second = self.layers["n1"], self.layers["n2"]
        added = self._attention(first(new), first(self.x)) if pre else self._attention(new, self.x)
        new = new + added if pre else first(new + added)
        return new + self._feed(second(new)) if pre else second(new + self._feed(new))

    def _attention(self, new: Tensor, x: Tensor) -> Tensor:
        heads, kv = self.wiring.heads
        sized = ((new, "q", heads), (x, "k", kv), (x, "v", kv))
        q, k, v = (self._layer(n, y).unflatten(-1, (h, -1)).transpose(1, 2) for y, n, h in sized)
        mask = None if self.mask is None else self.mask[..., -1:, :]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != kv)
        return self._layer("o", found.transpose(1, 2).flatten(2))

    def _feed(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.wiring.activation]
        up = self._layer("up", x)
        return self._layer("down", act(self._layer("gate", x)) * up if "gate" in self.layers else act(up))

    def _layer(self, name: str, x: Tensor) -> Tensor:
        rows, y = self.wiring.layers[name].rows, self.layers[name](x)
        return y if rows is None else rows.take(y, -1)


def layers_of(block: nn.Module, path: str, wiring: Wiring) -> dict[str, nn.Module]:
    """The modules of a block by role."""
    paths = {name: source.path for name, source in wiring.layers.items()}
    paths |= {"n1": wiring.norms[0], "n2": wiring.norms[1]}
    return {name: block.get_submodule(p.removeprefix(f"{path}.")) for name, p in paths.items()}


@torch.no_grad()
def check(model: nn.Module, graft: Graft) -> None:
    """Raise `RewriteError` unless rows that are the stream itself come out as the block puts them out, in float64."""
    assert graft.side is not None
    wiring = graft.side.wiring
    assert wiring is not None
    twin = copy.deepcopy(model.get_submodule(graft.path)).to("cpu", torch.float64).eval()
    layers = layers_of(twin, graft.path, wiring)
    width = next(layers["n1"].parameters()).shape[0]
    x = torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        out: Any = twin(x)
    except Exception as error:
        raise RewriteError(f"{graft.label} cannot check {graft.path}: it asks for more than its stream") from error
    expected = out if isinstance(out, Tensor) else out[0]
    error = (Rows(wiring, layers, x).through(x) - expected).abs().max() / expected.abs().max()
    if float(error) > TOLERANCE:
        raise RewriteError(
            f"{graft.label} cannot send rows through {graft.path}: it computes more than attention and a feed-forward "
            f"network with a norm each (what it puts out differs by {float(error):.1e})"
        )
