"""Virtual tokens: learned embeddings in front of a model's input, or learned keys and values in its cache.

Both are grafts of the model itself, fed by one forward pre-hook, which knows the arguments that models of Hugging
Face transformers have in common: `input_ids` or `inputs_embeds`, and where they are given `attention_mask`, `labels`,
`token_type_ids`, `position_ids` and the cache.  The caller counts no virtual tokens: its mask and positions
are of its own tokens alone, also in later steps, whose cache holds the virtual ones.  Outputs are not changed: virtual
tokens have logits too, in front.  transformers is imported where a cache has to be made, and nowhere else.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.runtime import fallback
from rewrite.runtime.adapter import ADAPTERS, Adapter

Call = dict[str, Any]
IGNORED = -100  # a label that has no loss
CACHES = ("past_key_values", "cache")
"""What models call their keys and values of past tokens: `cache` from transformers 5.24 on."""


def hook(model: nn.Module) -> None:
    """Let `model` read its virtual tokens; once, however many grafts there are."""
    if feed not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(feed, with_kwargs=True)
        model.register_forward_hook(forget, with_kwargs=True)


def feed(model: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
    """Forward pre-hook of a model with virtual tokens: they go before its first tokens, once."""
    if not torch.compiler.is_compiling():
        fallback.ran_eagerly()
    call = {**dict(zip(_names(model), args, strict=False)), **kwargs} if args else dict(kwargs)
    name = _cache_name(model)
    for other in CACHES:  # the caller may know either name
        if other != name and other in call:
            call[name] = call.pop(other)
    held = [a for a in getattr(model, ADAPTERS).values() if a.graft.where in _START]
    cache = call.get(name)
    seen = 0 if cache is None else cache.get_seq_length()
    if seen:
        return (), _continued(call, sum(_count(adapter) for adapter in held), seen)
    for adapter in held:
        call = _START[adapter.graft.where](model, adapter, call)
    return (), call


def forget(model: nn.Module, args: tuple[Any, ...], kwargs: Call, output: Any) -> Any:
    """Forward hook: a caller that wants no cache gets none, though learned keys and values need one inside."""
    if kwargs.get("use_cache") is not False or not isinstance(output, dict) or not set(CACHES) & set(output):
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in CACHES})


def _names(model: nn.Module) -> list[str]:
    """What positional arguments of a model's forward are called."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _cache_name(model: nn.Module) -> str:
    """What the forward of a model calls its cache."""
    return next((name for name in CACHES if name in _names(model)), CACHES[0])


def _count(adapter: Adapter) -> int:
    """How many virtual tokens a graft has: the rows of its first tensor."""
    return next(iter(adapter.graft.slots.values())).shape[0]


def _shape(call: Call) -> torch.Size:
    """(rows, tokens) of the input."""
    if (ids := call.get("input_ids")) is not None:
        return ids.shape
    if (embeds := call.get("inputs_embeds")) is not None:
        return embeds.shape[:2]
    raise RewriteError("a model with virtual tokens needs input_ids or inputs_embeds")


def _embed(model: nn.Module, adapter: Adapter, call: Call) -> Call:
    """A call with the embeddings of virtual tokens in front."""
    shape, count = _shape(call), _count(adapter)
    embeds = call.get("inputs_embeds")
    if embeds is None:
        embeds = _embedding(model, adapter)(call["input_ids"])
    new = adapter().to(embeds.dtype).expand(shape[0], -1, -1)
    found = {k: v for k, v in call.items() if k != "input_ids"} | {"inputs_embeds": torch.cat([new, embeds], dim=1)}
    for name, value in _FILL.items():
        given = call.get(name)
        if given is not None and given.shape == shape:  # one label for a whole row stays
            found[name] = torch.cat([given.new_full((shape[0], count), value), given], dim=1)
    if (positions := call.get("position_ids")) is not None:
        first = torch.arange(count, dtype=positions.dtype, device=positions.device)
        found["position_ids"] = torch.cat([first.expand(*positions.shape[:-1], -1), positions + count], dim=-1)
    return found | _masked(call, count)


_FILL = {"labels": IGNORED, "token_type_ids": 0}


def _prefill(model: nn.Module, adapter: Adapter, call: Call) -> Call:
    """A call with a cache that holds learned keys and values of past tokens."""
    rows, count = _shape(call)[0], _count(adapter)
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise RewriteError(
            f"{adapter.graft.label} lives in the cache, which gradient checkpointing drops: "
            "model.gradient_checkpointing_disable()"
        )
    cache = call.get(_cache_name(model))
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]  # a module's attribute may be anything
    past = adapter().to(_embedding(model, adapter).weight.dtype)
    for layer in range(past.shape[1]):
        keys, values = (past[:, layer, i].transpose(0, 1).expand(rows, -1, -1, -1) for i in range(2))
        cache.update(keys, values, layer)
    found = {**call, _cache_name(model): cache}
    if (positions := call.get("position_ids")) is not None:
        found["position_ids"] = positions + count
    return found | _masked(call, count)


_START = {"tokens": _embed, "past": _prefill}


def _continued(call: Call, count: int, seen: int) -> Call:
    """A later step: the cache holds the virtual tokens, which the caller's mask and positions do not count."""
    mask, total = call.get("attention_mask"), seen + _shape(call)[1]
    if mask is not None and _two(mask).shape[1] == total:
        return call
    if mask is not None and mask.shape[1] + count != total:
        raise RewriteError(
            f"the cache and the input hold {total} tokens, {count} of them virtual, and the attention mask is of "
            f"{mask.shape[1]}: it must be of {total - count}, or of all"
        )
    found = dict(call)
    if (positions := call.get("position_ids")) is not None:
        found["position_ids"] = positions + count
    return found | _masked(call, count)


def _masked(call: Call, count: int) -> Call:
    """The attention mask of a call with virtual tokens, which all are attended to; nothing where it has none."""
    if (mask := call.get("attention_mask")) is None:
        return {}
    mask = _two(mask)
    return {"attention_mask": torch.cat([mask.new_ones((mask.shape[0], count)), mask], dim=1)}


def _two(mask: Any) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise RewriteError(
            "virtual tokens need an attention mask of (rows, tokens), and a cache that grows (cache_implementation="
            "'dynamic')"
        )
    return mask


def _embedding(model: nn.Module, adapter: Adapter) -> Any:
    return operator.attrgetter(adapter.graft.tensor.rpartition(".")[0])(model)
