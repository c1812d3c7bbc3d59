"""What an adapted Hugging Face model does differently while it is adapted; a no-op for every other model.

`save_pretrained` saves the adapter (so `Trainer` does), and non-reentrant gradient checkpointing needs no
`requires_grad_()` hook on the embeddings, which no full graph survives.  transformers is never imported here.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

_SAVE, _GRADS, _CHECKPOINT = "save_pretrained", "enable_input_require_grads", "gradient_checkpointing_enable"


def adopt(model: nn.Module) -> None:
    """Override, on this instance alone, what would save or change the base."""
    for name, method in _OVERRIDES.items():
        if hasattr(type(model), name):
            model.__dict__[name] = types.MethodType(method, model)


def release(model: nn.Module) -> None:
    """Take the overrides off."""
    for name in _OVERRIDES:
        model.__dict__.pop(name, None)


def _save_pretrained(model: nn.Module, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
    """Save the adapter alone: the base is where it came from.  `rewrite.merge` first to save a plain model."""
    from rewrite.runtime.checkpoint import save

    save(model, save_directory)


def _gradient_checkpointing_enable(
    model: nn.Module, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> None:
    """As transformers does it, but always non-reentrant: a reentrant region sees no gradient on a frozen base."""
    kwargs = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
    type(model).gradient_checkpointing_enable(model, gradient_checkpointing_kwargs=kwargs)  # type: ignore[attr-defined]


def _enable_input_require_grads(model: nn.Module) -> None:
    """Nothing: gradients reach adapters without it, and its hook would break the graph."""


_OVERRIDES = {
    _SAVE: _save_pretrained,
    _GRADS: _enable_input_require_grads,
    _CHECKPOINT: _gradient_checkpointing_enable,
}
