"""The modules that hold a graft's tensors on the user's model, and the one hook that calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewrite.runtime import fallback
from rewrite.runtime.graft import ADAPTERS, Graft, leading


class Adapters(nn.ModuleDict):
    """The adapters on the output of one module; a type of its own, since a model may have `adapters` itself."""


class Adapter(nn.Module):
    """The tensors of one graft: parameters where they train, buffers where not; shared ones are parameters always.

    `shared` holds the tensors that grafts have in common so far: this one takes its own from there, or adds them.
    """

    def __init__(self, graft: Graft, device: torch.device, shared: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.graft, self.op = graft, graft.op
        for name, slot in graft.slots.items():
            if slot.shared:  # a parameter stays one object when the model moves, a buffer does not
                if slot.shared not in shared:
                    value = torch.empty(slot.held, dtype=slot.dtype, device=device)
                    shared[slot.shared] = nn.Parameter(value, requires_grad=slot.trainable)
                self.register_parameter(name, shared[slot.shared])
                continue
            value = torch.empty(slot.shape, dtype=slot.dtype, device=device)
            if slot.trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        if graft.gated:  # active until `rewrite.use` says otherwise
            dtype = next((slot.dtype for slot in graft.slots.values()), torch.float32)
            self.register_buffer("gate", torch.ones((), dtype=dtype, device=device), persistent=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The graft's tensors by slot name, in the order in which its op takes them."""
        return {name: leading(getattr(self, name), slot) for name, slot in self.graft.slots.items()}

    def operands(self) -> tuple[torch.Tensor, ...]:
        """What its op takes after the tensors of the module: its own, and its gate where it has one."""
        gate = (self.gate,) if self.graft.gated else ()
        return (*self.tensors().values(), *gate)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return self.graft.label


class Branch(Adapter):
    """An adapter on a module's input or output."""

    def forward(self, *activations: torch.Tensor | None) -> torch.Tensor:
        assert self.op is not None
        return self.op(*activations, *self.operands(), training=self.training)


class Reparametrisation(Adapter):
    """An adapter on a module's weight, registered with `torch.nn.utils.parametrize`."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        assert self.op is not None
        if not torch.compiler.is_compiling():
            fallback.ran_eagerly()
        return self.op(weight, *self.operands())

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def adapter_of(module: nn.Module, graft: Graft) -> Adapter:
    """The adapter module that holds the tensors of a graft."""
    held: Any
    if graft.where not in ("weight", "storage"):
        held = module._modules[ADAPTERS]
        return held[graft.name]
    held = module._modules["parametrizations"]
    return next(p for p in held[graft.tensor] if isinstance(p, Adapter) and p.graft is graft)


class Stored(nn.Module):
    """A storage format of a weight, registered with `torch.nn.utils.parametrize`: stored tensors -> weight."""

    def __init__(self, graft: Graft, dtype: torch.dtype) -> None:
        super().__init__()
        self.graft, self.op, self.dtype = graft, graft.op, dtype

    def forward(self, *stored: torch.Tensor) -> torch.Tensor:
        assert self.op is not None
        weight = self.graft.map.stored(self.op(*stored), self.graft.shape)
        return weight if weight.dtype == self.dtype else weight.to(self.dtype)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert self.graft.encode is not None
        return self.graft.encode(self.graft.map.matrix(weight).contiguous())

    def _apply(self, fn: Any, recurse: bool = True) -> Stored:
        # `model.to(dtype)` decides what the weight decodes to; the stored tensors keep their bits (`keep_bits`).
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return self.graft.label


def keep_bits(stored: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for stored tensors: moves them between devices, never casts them."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    for child in stored.children() if recurse else ():
        child._apply(fn)
    return type(stored)._apply(stored, move, recurse=False)


def load_dense(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """`load_state_dict` pre-hook: a dense weight, or a foreign checkpoint of the same format, goes where ours is."""
    held: Any = module._modules["parametrizations"]
    for tensor, parametrisations in held.items():
        name, inner = f"{prefix}{tensor}", f"{prefix}parametrizations.{tensor}.original"
        first = parametrisations[0]
        if name not in state or not isinstance(first, (Stored, Adapter)):
            continue
        if isinstance(first, Adapter):
            state[inner] = state.pop(name)
            continue
        values = first.graft.read(state, name) if first.graft.read else None
        if values is None:
            values = first.right_inverse(state[name])
        for key in [k for k in state if k == name or k.startswith(f"{name}.")]:
            del state[key]
        for number, value in enumerate(values):
            state[f"{inner}{number}"] = value


def call_adapters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of every adapted module: runs its adapters on (input, output), in order."""
    if not torch.compiler.is_compiling():
        fallback.ran_eagerly()
    x = args[0] if args else next(iter(kwargs.values()))
    for adapter in getattr(module, ADAPTERS).values():
        if adapter.graft.where == "output":
            output = adapter(x, output, *(getattr(module, name) for name in adapter.graft.reads))
    return output


def feed_adapters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of every module whose input is adapted: the last adapter is the nearest to the module."""
    if not torch.compiler.is_compiling():
        fallback.ran_eagerly()
    name = None if args else next(iter(kwargs))
    x = args[0] if name is None else kwargs[name]
    for adapter in getattr(module, ADAPTERS).values():
        if adapter.graft.where == "input":
            x = adapter(x)
    return ((x, *args[1:]), kwargs) if name is None else (args, kwargs | {name: x})
