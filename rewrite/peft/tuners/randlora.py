"""RANDLORA: two stacks of matrices for all layers, which a file holds once for the model and again at every layer."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Key, Kind, Part, Tensor, Tuner, table


class RandloraTuner(Tuner):
    """Sums of random products, weighed."""

    type = "RANDLORA"
    methods = ("randlora",)
    transposed = True
    arguments = table(
        {
            "r": ("r", 32),
            "alpha": ("randlora_alpha", 640),
            "dropout": ("randlora_dropout", 0.0),
            "seed": ("projection_prng_key", 0),
        }
    )
    starts = frozenset({"init_weights", "fan_in_fan_out", "save_projection"})
    extra = frozenset({"sparse", "very_sparse"})
    bias_only = "randlora_only"

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        name, given = super().call(config, target, kind)
        basis = "very_sparse" if config.get("very_sparse") else "sparse" if config.get("sparse") else "dense"
        return name, given | {"basis": basis}

    def keys(self, method: Any, part: Part) -> list[Key]:
        gamma = "gamma_in" if "gamma_in" in part.graft.slots else "gamma_out"
        found = [Key("lam", "randlora_lambda"), Key(gamma, "randlora_gamma")]
        for slot, name in (("A", "randlora_A"), ("B", "randlora_B")):
            held, shape = part.graft.slots[slot].held, _whole(method, part)[slot]
            write = functools.partial(_padded, shape=shape)
            read = functools.partial(_leading, shape=held)
            found += [Key(slot, name, write, read, scope="model"), Key(slot, name, write, read, optional=True)]
        return found

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        basis = {"sparse": method.basis == "sparse", "very_sparse": method.basis == "very_sparse"}
        return super().fields(method, part) | basis | {"save_projection": True}


def _whole(method: Any, part: Part) -> dict[str, tuple[int, ...]]:
    """The shapes in a file: PEFT draws for the largest sizes of all layers; ours are the part that they use."""
    sizes = [g.map.matrix_shape(g.shape) for g in part.grafts if "lam" in g.slots]
    narrow, wide = sorted((max(rows for rows, _ in sizes), max(columns for _, columns in sizes)))
    return {"A": (method.r, 1, narrow), "B": (wide, -(-narrow // method.r), method.r)}


def _leading(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)]


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    sides = [side for size, wanted in zip(tensor.shape, shape, strict=True) for side in (wanted - size, 0)]
    return F.pad(tensor, sides[::-1]) if any(sides) else tensor
