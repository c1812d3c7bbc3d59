"""PROMPT_TUNING, P_TUNING and PREFIX_TUNING: a file holds the virtual tokens alone, not the network that made them."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Key, Kind, Part, Tensor, Tuner, shaped

NAME = "prompt_embeddings"


class PromptTuner(Tuner):
    """Embeddings in front of the input."""

    type = "PROMPT_TUNING"
    methods = ("prompt", "ptuning")
    kinds = frozenset({"prompt"})
    extra = frozenset({"num_virtual_tokens"})
    # how it starts, what the network is that made it, and sizes that the model has
    starts = frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights"}
        | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
        | {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "prefix_projection"}
    )

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        if config.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
            raise config.refuse("task_type", "rewrite reads virtual tokens of causal language models")
        return self.methods[0], {"n": config.get("num_virtual_tokens", 20)}

    def keys(self, method: Any, part: Part) -> list[Key]:
        return [Key("P", NAME, scope="file")] if method.name == "prompt" else []

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return {"num_virtual_tokens": method.n, "task_type": "CAUSAL_LM"}

    def converted(self, method: Any, part: Part, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {NAME: method.tokens(**values)}


class PTuner(PromptTuner):
    """The same: the encoder is not in the file."""

    type = "P_TUNING"
    methods = ("prompt",)


class PrefixTuner(PromptTuner):
    """Keys and values before the input, those of a layer after one another."""

    type = "PREFIX_TUNING"
    methods = ("prefix",)

    def keys(self, method: Any, part: Part) -> list[Key]:
        return [_wide(shaped("P", NAME, part, (method.n, -1)))] if method.hidden is None else []

    def converted(self, method: Any, part: Part, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {NAME: method.past(**values).flatten(1)}


def _wide(key: Key) -> Key:
    return Key(key.slot, key.name, key.peft, key.ours, scope="file")
