"""ROAD."""

from __future__ import annotations

from typing import Any

from rewrite.peft.tuner import Part, Tuner, table


class RoadTuner(Tuner):
    """Pairs of outputs, rotated and scaled."""

    type = "ROAD"
    methods = ("road",)
    arguments = table({"variant": ("variant", "road_1"), "group": ("group_size", 64)})
    starts = frozenset({"init_weights"})
    tensors = table({"theta": "road_theta", "alpha": "road_alpha"})

    def fits(self, method: Any, part: Part) -> str | None:
        outputs = part.graft.shape[0]
        return f"PEFT's RoAd pairs an even number of outputs, not {outputs}" if outputs % 2 else None

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return super().fields(method, part) | {"group_size": method.size(part.graft.shape[0])}
