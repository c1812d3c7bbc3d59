"""Where tokens enter a model: what methods that add virtual tokens must know of it.

Nothing here knows an architecture: only what every model of Hugging Face transformers answers to.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewrite.runtime.prompts import CACHES


@dataclass(frozen=True)
class Cache:
    """Sizes of the keys and values that a model keeps of the past."""

    layers: int
    heads: int
    width: int


@dataclass(frozen=True)
class Entry:
    """The embedding of a model's input tokens, by path; why nothing can be put before them; sizes of its cache."""

    path: str
    no_tokens: str = ""
    no_past: str = ""
    cache: Cache | None = None

    def refusal(self, view: str) -> str | None:
        """Why a method of this view cannot stand there, or None."""
        return {"tokens": self.no_tokens, "past": self.no_past}.get(view, "it adds no virtual tokens") or None


def entry_of(model: nn.Module) -> Entry | None:
    """The entry of a live model; None where it does not say which embedding reads its tokens."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    path = next((p for p, m in model.named_modules() if m is embedding), "")
    if not path or not isinstance(embedding, nn.Embedding):
        return None
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        why = "the model has two inputs, of its encoder and of its decoder"
        return Entry(path, why, why)
    arguments, cache = inspect.signature(type(model).forward).parameters, _cache(config)
    no_tokens = "" if "inputs_embeds" in arguments else "the model does not take embeddings for tokens (inputs_embeds)"
    no_past = "" if set(CACHES) & set(arguments) and cache else "the model keeps no keys and values of past tokens"
    return Entry(path, no_tokens, no_past, cache)


def _cache(config: Any) -> Cache | None:
    """The sizes that a configuration states; None where layers differ or it does not say."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None) or ()
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        return None
    if any(getattr(config, name, None) for name in ("kv_lora_rank", "num_kv_shared_layers")):
        return None
    layers = getattr(config, "num_hidden_layers", None)
    each = [_heads(c) for c in getattr(config, "per_layer_config", None) or [config]]
    heads = each[0]
    if not isinstance(layers, int) or heads is None or any(other != heads for other in each):
        return None
    return Cache(layers, *heads)


def _heads(config: Any) -> tuple[int, int] | None:
    """(heads of keys and values, width of one) of a layer."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not (isinstance(heads, int) and isinstance(hidden, int)):
        return None
    width = getattr(config, "head_dim", None) or hidden // heads
    shared = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
    return shared or heads, width
