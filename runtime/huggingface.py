"""What an adapted Hugging Face model does differently while it is adapted; a no-op for every other model.

`save_pretrained` saves the adapter (so `Trainer` does), and non-reentrant gradient checkpointing needs no
`requires_grad_()` hook on the embeddings, which no full graph survives.  transformers is never imported here.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

_SAVE, _GRADS, _CHECKPOINT = "save_pretrained", "enable_input_require_grads", "gradient_checkpointing_enable"
_FUNCTION = "_gradient_checkpointing_func"  # of transformers, on every module that checkpoints
_HOOKED, _REENTRANT = "_rewrite_input_gradients", "_rewrite_reentrant"  # what we took off, to be put back


def adopt(model: nn.Module) -> None:
    """Override, on this instance alone, what would save or change the base, and undo what was enabled before."""
    for name, method in _OVERRIDES.items():
        if hasattr(type(model), name):
            model.__dict__[name] = types.MethodType(method, model)
    if getattr(model, "_require_grads_hooks", None) or hasattr(model, "_require_grads_hook"):
        model.__dict__[_HOOKED] = True
        model.disable_input_require_grads()  # type: ignore[operator]
    for module in model.modules():
        func = module.__dict__.get(_FUNCTION)
        if isinstance(func, functools.partial) and func.keywords.get("use_reentrant"):
            module.__dict__[_REENTRANT] = func
            module.__dict__[_FUNCTION] = functools.partial(
                func.func, *func.args, **func.keywords | {"use_reentrant": False}
            )


def release(model: nn.Module) -> None:
    """Take the overrides off."""
    for name in _OVERRIDES:
        model.__dict__.pop(name, None)
    if model.__dict__.pop(_HOOKED, False):
        model.enable_input_require_grads()  # type: ignore[operator]
    for module in model.modules():
        if (func := module.__dict__.pop(_REENTRANT, None)) is not None:
            module.__dict__[_FUNCTION] = func


def _save_pretrained(model: nn.Module, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
    """Save the adapter alone: the base is where it came from.  `rewrite.merge` first to save a plain model."""
    from rewrite.runtime.checkpoint import save

    save(model, save_directory)


def _gradient_checkpointing_enable(
    model: nn.Module, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
) -> None:
    """As transformers does it, but always non-reentrant: a reentrant region sees no gradient on a frozen base."""
    kwargs = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
    enable: Any = type(model).gradient_checkpointing_enable  # type: ignore[attr-defined]
    enable(model, gradient_checkpointing_kwargs=kwargs, **settings)


def _enable_input_require_grads(model: nn.Module) -> None:
    """Nothing: gradients reach adapters without it, and its hook would break the graph."""


_OVERRIDES = {
    _SAVE: _save_pretrained,
    _GRADS: _enable_input_require_grads,
    _CHECKPOINT: _gradient_checkpointing_enable,
}
