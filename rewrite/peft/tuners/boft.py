"""BOFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Key, Kind, Part, Tensor, Tuner, shaped, table

_FACTORS = "boft_n_butterfly_factor"


def value_of(config: Config) -> int:
    """The number of butterfly factors that a configuration asks for."""
    return config.get(_FACTORS, 1)


class BoftTuner(Tuner):
    """Butterflies of rotations, and a scale of the outputs."""

    type = "BOFT"
    methods = ("boft",)
    kinds = frozenset({"linear", "conv2d"})
    extra = frozenset({"boft_block_size", "boft_block_num", _FACTORS})
    honours = frozenset()  # PEFT takes the first of the sizes of each side for all
    starts = frozenset({"init_weights", "fan_in_fan_out"})
    only = table({"boft_dropout": ((0, 0.0), "it drops blocks of a rotation, which no method of rewrite does")})
    bias_only = "boft_only"

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        blocks = config.get("boft_block_num", 0)
        given = {"blocks": blocks or None, "factors": value_of(config)}
        return "boft", given if blocks else {"block": config.get("boft_block_size", 4)} | given

    def informed(self, config: Config, tensors: Mapping[str, Tensor]) -> Config:
        # PEFT takes one factor where it cannot build its CUDA kernel, whatever the configuration says.
        factors = next((value.shape[0] for name, value in tensors.items() if name.endswith("boft_R")), None)
        if factors is None or value_of(config) == factors:
            return config
        return replace(config, fields={**config.fields, _FACTORS: factors})

    def keys(self, method: Any, part: Part) -> list[Key]:
        rows = part.shape("s")[0]
        return [Key("R", "boft_R"), shaped("s", "boft_s", part, (1, rows) if part.kernel else (rows, 1))]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return {
            "boft_block_size": 0 if method.blocks else method.block,
            "boft_block_num": method.blocks or 0,
            _FACTORS: method.factors,
        }
