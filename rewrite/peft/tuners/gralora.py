"""GRALORA."""

from __future__ import annotations

from typing import Any

from rewrite.peft.tuner import Key, Part, Tuner, table


class GraloraTuner(Tuner):
    """A low-rank update in blocks; PEFT stacks the blocks of A by input and those of B by output."""

    type = "GRALORA"
    methods = ("gralora",)
    transposed = True
    arguments = table(
        {
            "r": ("r", 32),
            "alpha": ("alpha", 64),
            "k": ("gralora_k", 2),
            "hybrid": ("hybrid_r", 0),
            "dropout": ("gralora_dropout", 0.0),
        }
    )
    starts = frozenset({"init_weights", "fan_in_fan_out"})
    bias_only = "gralora_only"

    def keys(self, method: Any, part: Part) -> list[Key]:
        k = method.k
        found = [
            Key(
                "A",
                "gralora_A",
                lambda t: t.unflatten(1, (k, -1)).permute(1, 2, 0),
                lambda t: t.permute(2, 0, 1).flatten(1),
            ),
            Key(
                "B",
                "gralora_B",
                lambda t: t.unflatten(0, (k, -1)).transpose(1, 2),
                lambda t: t.transpose(1, 2).flatten(0, 1),
            ),
        ]
        if method.hybrid:
            found += [Key("A1", "gralora_A_general.weight"), Key("B1", "gralora_B_general.weight")]
        return found

    def fits(self, method: Any, part: Part) -> str | None:
        rows, columns = part.shape("B")[0], part.shape("A")[1]
        return f"k={method.k} does not divide {rows} x {columns}" if rows % method.k or columns % method.k else None

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        alpha = method.r + method.hybrid if method.alpha is None else method.alpha
        return super().fields(method, part) | {"alpha": alpha}
