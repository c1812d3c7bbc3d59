"""Rules about saved values on the modules of a model: markers while a graph is captured, in eager the rules themselves.

Eager stores through `saved_tensors_hooks` around the forward of a module and recomputes as checkpointing does.  It
knows nothing of what reads a value, so it encodes less than a compiled step: see `Encoding.takes`.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator

from rewrite.codegen.activations import NONLINEARITIES, coarse_activation
from rewrite.codegen.codecs import Codec, memory_order
from rewrite.passes.coarse import of_call
from rewrite.passes.keep import Budgeted, Coarse, Encoded, Placed, Recomputed, Rule, block, marker
from rewrite.passes.record import summarise

_HELD = "_rewrite_keep"
_STATISTIC = 4
_open = threading.local()
Tensor = torch.Tensor


@dataclass
class Held:
    """What a module was told: rules to mark in a graph, and those that it carries out itself in eager."""

    markers: list[Callable[[Any], Any]] = field(default_factory=list)
    codec: Codec | None = None
    coarse: Coarse | None = None
    recomputes: bool = False

    @property
    def eager(self) -> bool:
        return self.codec is not None or self.coarse is not None or self.recomputes


def place(model: nn.Module, rules: Sequence[Placed]) -> list[str]:
    """Put rules on the modules of a model; what eager does not carry out comes back in words."""
    for path, rule in rules:
        _held(model.get_submodule(path)).markers.append(marker(rule))
    notes = []
    # Clauses with sites have the last word where a module is told twice.
    for rule, groups in _groups(sorted(rules, key=lambda placed: placed[0] != "")).items():
        left: list[str] = []
        for paths in groups:
            owners = [] if isinstance(rule, Budgeted) else _owners(model, paths, rule)
            left += [] if owners else paths
            for owner in owners:
                _tell(_held(model.get_submodule(owner)), rule)
        if left:
            where = summarise([path for path in left if path]) or "the whole model"
            notes.append(f"{rule.label}: in eager nothing of it is carried out at {where}")
    return list(dict.fromkeys(notes))


def _tell(held: Held, rule: Rule) -> None:
    """Have a module carry a rule out in eager."""
    if isinstance(rule, Encoded):
        held.codec = rule.codec
    if isinstance(rule, Coarse):
        held.coarse = rule
    held.recomputes |= isinstance(rule, Recomputed)


def take_off(model: nn.Module) -> None:
    """Remove all rules from a model."""
    for module in model.modules():
        if _HELD in module.__dict__:
            del module.__dict__[_HELD]
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [k for k, hook in hooks.items() if hook in (enter, leave)]:
                    del hooks[key]
                    for table in (
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                        module._forward_pre_hooks_with_kwargs,
                    ):
                        table.pop(key, None)


def _held(module: nn.Module) -> Held:
    if _HELD not in module.__dict__:
        module.__dict__[_HELD] = Held()
        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True, always_call=True)
    return module.__dict__[_HELD]


def _groups(rules: Sequence[Placed]) -> Mapping[Rule, list[list[str]]]:
    """The modules of every rule, those of a family in one block together."""
    found: dict[Rule, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path, rule in rules:
        found[rule][block(path) if rule.family else path].append(path)
    return {rule: list(groups.values()) for rule, groups in found.items()}


def _owners(model: nn.Module, paths: list[str], rule: Rule) -> list[str]:
    """The modules around whose forward eager carries a rule out.

    A family has the smallest module that holds it, unless that is the block itself, which holds more.  For the whole
    model it is every block, so that the loss stays out.
    """
    if paths == [""]:
        blocks = [p for p, m in model.named_modules() if p and block(p) == p]
        return blocks or [name for name, _ in model.named_children()]
    shared = paths[0].split(".")
    for path in paths[1:]:
        names = path.split(".")
        shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, names, strict=False)) if a != b), len(shared))]
    owner = ".".join(shared)
    if owner and not (rule.family and owner == block(paths[0])):
        return [owner]
    return paths if isinstance(rule, Encoded) else []  # what lies between them is in no module of its own


# --- around a forward ---


def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of every module that has rules, before any other."""
    held: Held = getattr(module, _HELD)
    if torch.compiler.is_compiling():
        for mark in held.markers:
            args, kwargs = _marked(mark, args, kwargs)
        return args, kwargs
    if held.eager and torch.is_grad_enabled() and not getattr(_open, "replaying", False):
        stack = ExitStack()
        _stack().append((module, stack))
        if held.codec is not None and not _checkpointed():
            stack.enter_context(Encoding(held.codec, module, args, kwargs))
        if held.coarse is not None:
            stack.enter_context(Coarsening(held.coarse))
        if held.recomputes and not _keeps_state((*args, *kwargs.values())):
            stack.enter_context(_Checkpoint(module, args, kwargs))
    return None


def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of every module that has rules, after all others; also when its forward fails."""
    if torch.compiler.is_compiling():
        return
    stack = _stack()
    if stack and stack[-1][0] is module:
        stack.pop()[1].close()


def _marked(
    mark: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with a marker on the first tensor among them."""
    for number, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            return (*args[:number], mark(value), *args[number + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            return args, {**kwargs, name: mark(value)}
    return args, kwargs


def _keeps_state(values: Sequence[Any]) -> bool:
    """Whether a module is given a cache to write to, which a second forward would write to again."""
    return any(hasattr(value, "get_seq_length") for value in values)


def _stack() -> list[tuple[nn.Module, ExitStack]]:
    if not hasattr(_open, "stack"):
        _open.stack = []
    return _open.stack


def _hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """What autograd calls for a tensor that it saves now, and to have it back."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]


def _checkpointed() -> bool:
    """Whether activation checkpointing is at work here: it saves nothing, so there is nothing to encode."""
    hooks = _hooks()
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


class _Checkpoint:
    """Non-reentrant checkpointing of the forward of a module that is under way."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def again() -> Any:
            before, _open.replaying = getattr(_open, "replaying", False), True
            try:
                return module(*args, **kwargs)
            finally:
                _open.replaying = before

        self.steps = _checkpoint_without_reentrant_generator(again)

    def __enter__(self) -> None:
        next(self.steps)

    def __exit__(self, *_: object) -> None:
        next(self.steps, None)


class Coarsening(TorchFunctionMode):
    """Lets the nonlinearities that are called while it is entered store their derivative."""

    def __init__(self, rule: Coarse) -> None:
        super().__init__()
        self.rule = rule

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = of_call(getattr(func, "__name__", "") if _is_method(func) else func, args, kwargs)
        x = (args[0] if args else kwargs.get("input")) if known is not None else None
        if known is not None and isinstance(x, torch.Tensor) and x.ndim and x.requires_grad:
            bits = NONLINEARITIES[known[0]].bits(self.rule.bits, self.rule.approximate)
            if bits is not None:
                return coarse_activation(x, known[0], bits, known[1])
        return func(*args, **kwargs)


def _is_method(func: Any) -> bool:
    return getattr(func, "__objclass__", None) is torch._C.TensorBase  # x.relu()


class _Stored:
    """The stored tensors of an encoded value, or what other hooks made of them: one for all that saves it."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts


@dataclass(frozen=True)
class _Saved:
    """One value that autograd saved: codes, and how it lay in memory."""

    stored: _Stored
    dtype: torch.dtype
    shape: tuple[int, ...]  # in the order in memory
    back: tuple[int, ...]  # the order of dimensions that it had


class Encoding:
    """Stores what autograd saves while it is entered, by a codec."""

    def __init__(self, codec: Codec, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.codec = codec
        held = [t for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"]
        self.storages = {t.untyped_storage()._cdata for t in held}
        self.shapes = {tuple(s) for t in held if t.ndim > 1 for s in (t.shape, t.transpose(-1, -2).shape)}
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        self.width = given[0].numel() if given else 0
        self.known: dict[Any, tuple[StorageWeakRef, _Stored]] = {}
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)
        outer = _hooks()
        within = getattr(outer[0], "__self__", None) if outer is not None else None
        if isinstance(within, Encoding):  # the innermost decides
            outer = within.outer
        self.outer = outer  # those of somebody who counts what is saved, or moves it: they are handed the codes

    def __enter__(self) -> None:
        self.hooks.__enter__()

    def __exit__(self, *failure: Any) -> None:
        self.hooks.__exit__(*failure)
        self.known.clear()

    def takes(self, t: Tensor) -> bool:
        """Whether a value is an activation, as far as its shape tells.

        Not a parameter, nor anything of its shape (a weight that was cast or decoded), nothing that is much smaller
        than the input of the module (a statistic).
        """
        if not t.dtype.is_floating_point or t.dtype.itemsize < 2 or t.ndim < 2 or t.shape[-1] < 2:
            return False
        if t.untyped_storage()._cdata in self.storages or tuple(t.shape) in self.shapes:
            return False
        return t.numel() * _STATISTIC > self.width and self.codec.bytes(tuple(t.shape), t.dtype) < t.nbytes

    def pack(self, t: Tensor) -> Any:
        order = memory_order(t.shape, t.stride()) if self.takes(t) and t.storage_offset() == 0 else None
        if order is None:
            return self.handed(t)
        storage, rows = t.untyped_storage(), t.detach().permute(order)
        key = (storage._cdata, t._version, t.dtype, t.numel(), rows.shape[-1])
        if key not in self.known:
            with torch.no_grad(), torch.autocast(t.device.type, enabled=False):
                codec = self.codec
                parts = torch.ops.rewrite.encode_saved(rows.flatten(0, -2), codec.name, codec.group)
                stored = _Stored(tuple(map(self.handed, parts)))
            # The reference keeps the number of a storage that is gone from being used again.
            self.known[key] = StorageWeakRef(storage), stored
        back = tuple(sorted(range(t.ndim), key=order.__getitem__))
        return _Saved(self.known[key][1], t.dtype, tuple(rows.shape), back)

    def unpack(self, held: Any) -> Tensor:
        if not isinstance(held, _Saved):
            return self.returned(held)
        parts = tuple(map(self.returned, held.stored.parts))
        with torch.no_grad(), torch.autocast(parts[0].device.type, enabled=False):
            rows = torch.ops.rewrite.decode_saved(*parts, self.codec.name, self.codec.group, held.dtype)
        return rows.view(held.shape).permute(held.back)

    def handed(self, t: Tensor) -> Any:
        return t if self.outer is None else self.outer[0](t)

    def returned(self, held: Any) -> Tensor:
        return held if self.outer is None else self.outer[1](held)
