"""P-tuning: virtual tokens that a small network makes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Ptuning(Method):
    """[P; E(input)], P = MLP(V) or MLP(LSTM(V)) of n learned vectors V  (Liu et al. 2021)"""

    n: int = arg(20, low=1, help="virtual tokens")
    encoder: Literal["mlp", "lstm"] = arg("mlp", help="three linear layers; or a bidirectional LSTM and two")
    hidden: int | None = arg(None, low=1, help="width of the encoder; none is that of the embeddings")
    layers: int = arg(2, low=1, help="layers of the LSTM")

    kinds = frozenset({"tokens"})
    default_sites = "input"
    identity = False
    paper = "https://arxiv.org/abs/2103.10385"

    def params(self, site: Site) -> dict[str, Param]:
        width = site.in_features
        hidden = self.hidden or width
        theta = {"V": Param((self.n, width), torch.nn.init.normal_)}
        for layer in range(self.layers if self.encoder == "lstm" else 0):
            for way in ("", "_reverse"):
                sizes = {"ih": (width if layer == 0 else 2 * hidden,), "hh": (hidden,)}
                fill = _uniform(hidden)
                theta |= {f"weight_{k}_l{layer}{way}": Param((4 * hidden, *s), fill) for k, s in sizes.items()}
                theta |= {f"bias_{k}_l{layer}{way}": Param((4 * hidden,), fill) for k in sizes}
        widths = (2 * hidden, 2 * hidden, width) if self.encoder == "lstm" else (width, hidden, hidden, width)
        for i, (columns, rows) in enumerate(itertools.pairwise(widths), 1):
            theta |= {f"W{i}": Param((rows, columns), _uniform(columns)), f"b{i}": Param((rows,), _uniform(columns))}
        return theta

    def tokens(self, V: Tensor, **theta: Tensor) -> Tensor:
        x = V
        if self.encoder == "lstm":
            flat = [tensor for name, tensor in theta.items() if name.startswith(("weight_", "bias_"))]
            zeros = V.new_zeros((2 * self.layers, 1, flat[1].shape[1]))
            x = torch.lstm(V.unsqueeze(0), [zeros, zeros], flat, True, self.layers, 0.0, False, True, True)[0].squeeze(
                0
            )
        count = 2 if self.encoder == "lstm" else 3
        for i in range(1, count + 1):
            x = F.linear(x if i == 1 else F.relu(x), theta[f"W{i}"], theta[f"b{i}"])
        return x


def _uniform(fan: int) -> partial[Tensor]:
    """Uniform in +-1/sqrt(fan), as PyTorch starts linear layers, their biases and LSTMs."""
    return partial(torch.nn.init.uniform_, a=-(fan**-0.5), b=fan**-0.5)
