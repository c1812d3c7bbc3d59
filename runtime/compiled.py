"""Compiled calls of a model: `model(...)` goes through Dynamo under settings of our own, nothing else does."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn

from rewrite.runtime.attach import CompiledCallBase, require
from rewrite.runtime.backend import check_backend, check_mode, rewrite_backend
from rewrite.runtime.graft import Regime
from rewrite.runtime.regimes import watch

_RECOMPILES = 64  # a normal session uses the default of 8: two lengths, two batch sizes, eval, switches
_DEFAULT_RECOMPILES = 8
_MOST = 1024  # graphs for the choices of regimes
_LOGGING = {getattr(logging.Logger, name) for name in ("warning", "info", "debug")}


class _Functions(dict[Callable[..., Any], None]):
    """Functions for Dynamo to ignore: a set, but one that PyTorch 2.11 can log.

    It logs its settings with every compilation, sorts each set among them, and prints a traceback where a set holds
    functions, which have no order.  A mapping without items it prints.
    """

    def items(self) -> Any:
        return {}.items()


class CompiledCall(CompiledCallBase):
    """Calls a model through `torch.compile(backend="rewrite")`; a copy of the model is not compiled."""

    def __init__(
        self, model: nn.Module, backend: str, dynamic: bool | None, chunked_loss: bool, mode: str | None
    ) -> None:
        self.model = model
        options = {"backend": backend, "chunked_loss": chunked_loss, "mode": mode}
        self.call = torch.compile(entry_of(model), backend=rewrite_backend, dynamic=dynamic, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = require(self.model)
        if any(regime.counts for regime in state.regimes):
            watch(self.model, args, kwargs)
        with torch._dynamo.config.patch(settings(state.regimes)), state.calls.counting():
            return self.call(self.model, *args, **kwargs)


def entry_of(model: nn.Module) -> Callable[..., Any]:
    """`(model, *args, **kwargs) -> model(...)` for `torch.compile`, with a code object of its own.

    Dynamo counts recompiles, and looks up graphs, per code object.
    """
    return types.FunctionType(_call.__code__.replace(co_name=f"call_{type(model).__name__}"), globals())


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Dynamo starts at the first frame that is not torch's own: here, so that hooks and containers of torch at the
    # top of a model are in the graph too.
    return module._call_impl(*args, **kwargs)


def settings(regimes: Sequence[Regime] = ()) -> dict[str, Any]:
    """Dynamo's settings for our calls: logging in a forward does not break graphs; more recompiles.

    What is at work decides the graph: one for training and one for evaluation, for each choice.
    """
    config = torch._dynamo.config
    once = {fn} if (fn := getattr(logging.Logger, "warning_once", None)) else set()
    found: dict[str, Any] = {
        "ignore_logging_functions": _Functions.fromkeys([*config.ignore_logging_functions, *_LOGGING, *once]),
        # `dynamic=True` would make graph inputs of eps and softmax scales, only to compile all over without them.
        "specialize_float": True,
    }
    if config.recompile_limit == _DEFAULT_RECOMPILES:  # a limit that the user chose stays
        chosen = min(sum(2 * (regime.choices or 1) for regime in regimes), _MOST)
        found["recompile_limit"] = _RECOMPILES + chosen
        found["accumulated_recompile_limit"] = max(config.accumulated_recompile_limit, _RECOMPILES + chosen)
    return found


def compile_model(
    model: nn.Module, backend: str, dynamic: bool | None, chunked_loss: bool = True, mode: str | None = None
) -> nn.Module:
    """Compile an attached model in place: it stays an instance of its class, `model.forward` stays eager.

    `chunked_loss`: compute the loss of a training step in chunks of rows, without all logits at once.  `mode` is
    Inductor's.
    """
    state = require(model)
    state.backend = check_backend(backend)
    model._compiled_call_impl = CompiledCall(model, backend, dynamic, chunked_loss, check_mode(mode))
    return model
