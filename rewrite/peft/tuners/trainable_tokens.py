"""TRAINABLE_TOKENS: rows of an embedding; of the head too where it shares the weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Key, Kind, Part, Tuner


class TokensTuner(Tuner):
    """Some rows, trained."""

    type = "TRAINABLE_TOKENS"
    methods = ("tokens",)
    kinds = frozenset({"linear", "embedding"})
    extra = frozenset({"token_indices"})
    starts = frozenset({"init_weights"})

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        return "tokens", {"ids": tuple(config.get("token_indices", ()))}

    def refusal(self, module: Any, kind: Kind) -> str | None:
        if isinstance(module, nn.Linear) and module.bias is not None:
            return "PEFT leaves out its bias as soon as rows of it are trained"
        return super().refusal(module, kind)

    def keys(self, method: Any, part: Part) -> list[Key]:
        slot, name = "E" if "E" in part.graft.slots else "H", "trainable_tokens_delta"
        alone = not part.prefix.endswith("token_adapter.")  # beside LoRA, the head that shares the weight has no copy
        copies = [f"base_model.model.{path}.{name}" for path in part.graft.sharers if alone]
        return [Key(slot, name), *(Key(slot, copy, scope="file", optional=True) for copy in copies)]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return {"token_indices": tuple(method.ids)}
