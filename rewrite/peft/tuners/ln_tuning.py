"""LN_TUNING: modules trained as they are, norms by default."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Kind, Tuner


class LnTuner(Tuner):
    """A trained copy of each module."""

    type = "LN_TUNING"
    methods = ("norm",)
    trained = "ln_tuning_layers."

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        if not config.saved_modules:
            return "full", {}
        if target is None or "norm" not in type(target.module).__name__.lower():
            raise config.refuse("modules_to_save", "they are trained as its targets are: list them in target_modules")
        return "norm", {}

    def refusal(self, module: Any, kind: Kind) -> str | None:
        if any(True for _ in module.children()) or any(True for _ in module.buffers()):
            return "PEFT copies it with all that it holds: name layers that hold no modules and no buffers"
        return (
            None if isinstance(module, nn.Module) and any(True for _ in module.parameters()) else "it has no parameters"
        )
