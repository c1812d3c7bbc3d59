"""GLORA."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Key, Kind, Part, Tuner, shaped, table


class GloraTuner(Tuner):
    """A, B and, where the layer has a bias, C, D, E: low-rank as Xd Xu, or one tensor X."""

    type = "GLORA"
    methods = ("glora",)
    arguments = table(
        {
            "r": ("r", 8),
            "ab": ("config_A_B", "lora"),
            "c": ("config_C", "lora"),
            "de": ("config_D_E", "constant"),
        }
    )
    starts = frozenset({"init_weights"})
    bias_only = "glora_only"

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        name, given = super().call(config, target, kind)
        return name, {k: None if v == "none" else v for k, v in given.items()}

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return {field: "none" if value is None else value for field, value in super().fields(method, part).items()}

    def keys(self, method: Any, part: Part) -> list[Key]:
        found = []
        for slot in part.graft.slots:
            name = f"glora_{slot[0]}.X{slot[1:]}"
            column = slot in ("A", "B") and method.ab == "vector"
            found.append(shaped(slot, name, part, (*part.shape(slot), 1)) if column else Key(slot, name))
        return found

    def constants(self, method: Any, part: Part) -> dict[str, tuple[int, ...]]:
        rows, columns = part.module.weight.shape  # type: ignore[misc]  # a linear layer
        shapes = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1), "D": (rows,), "E": (rows,)}
        held = {slot[0] for slot in part.graft.slots}
        return {f"glora_{name}.zeros": shape for name, shape in shapes.items() if name not in held}
