"""VERA: two matrices for all layers, which the file holds or the seed says."""

from __future__ import annotations

from typing import Any

from rewrite.peft.tuner import Key, Part, Tuner, table


class VeraTuner(Tuner):
    """b * (B (d * (A x)))."""

    type = "VERA"
    methods = ("vera",)
    transposed = True
    arguments = table(
        {
            "r": ("r", 256),
            "d0": ("d_initial", 0.1),
            "dropout": ("vera_dropout", 0.0),
            "seed": ("projection_prng_key", 0),
        }
    )
    starts = frozenset({"init_weights", "fan_in_fan_out", "save_projection"})
    bias_only = "vera_only"

    def keys(self, method: Any, part: Part) -> list[Key]:
        return [
            Key("b", "vera_lambda_b"),
            Key("d", "vera_lambda_d"),
            Key("A", "vera_A", scope="model", optional=True),
            Key("B", "vera_B", scope="model", optional=True),
        ]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return super().fields(method, part) | {"save_projection": True}
