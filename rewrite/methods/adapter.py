"""Bottleneck adapters: a small network with a non-linearity after a layer, or beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Adapter(Method):
    """y + s (U act(D z + b) + c), z = y in series, z = x in parallel  (Houlsby et al. 2019; He et al. 2022)

    `adapter` alone stands behind attention and behind the feed-forward network, as in Houlsby et al., who train the
    norms besides (`+ full(norm)`).  `adapter@ffn.down` is the placement of Pfeiffer et al. (2021).  In parallel it
    stands beside a single linear layer (Hu et al. 2023), never around a whole feed-forward network.
    """

    r: int = arg(16, low=1, help="width of the bottleneck")
    act: Activation = arg("gelu", help="the non-linearity in the bottleneck")
    scale: float = arg(1.0, above=0, help="s, a fixed factor on the branch")
    mode: Literal["series", "parallel"] = arg("series", help="whether it reads the output of the layer or its input")
    bias: bool = arg(True, help="train the biases b and c")

    kinds = frozenset({"linear", "norm", "embedding", "conv"})
    default_sites = "attn.o,ffn.down"
    paper = "https://arxiv.org/abs/1902.00751"

    def params(self, site: Site) -> dict[str, Param]:
        width = site.outputs if self.mode == "series" else site.inputs
        theta = {"down": Param((self.r, width), kaiming), "up": Param((site.outputs, self.r))}
        biases = {"down_bias": Param((self.r,)), "up_bias": Param((site.outputs,))}
        return theta | biases if self.bias else theta

    def fits(self, site: Site) -> str | None:
        if self.mode == "parallel" and site.kind != "linear":
            return f"in parallel it maps the inputs of a linear layer to its outputs, this is of kind {site.kind}"
        return None

    def output(
        self,
        x: Tensor,
        y: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
    ) -> Tensor:
        z = y if self.mode == "series" else x
        return y + self.scale * F.linear(ACTIVATIONS[self.act](F.linear(z, down, down_bias)), up, up_bias)
