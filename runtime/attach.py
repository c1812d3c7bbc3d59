"""Puts grafts on a model with PyTorch's own mechanisms, and takes them off again, bit for bit.

`input` and `output` grafts are child modules called by one forward hook each, as those of virtual tokens are
(`runtime.prompts`); `weight` and `storage` grafts are parametrisations.  Nothing here compiles.  A failed attach
leaves the model as it was.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from rewrite.errors import RewriteError
from rewrite.passes.keep import Placed
from rewrite.runtime import captures, huggingface, keeping, prompts, regimes, side
from rewrite.runtime.adapter import (
    ADAPTERS,
    Adapter,
    Adapters,
    Branch,
    Reparametrisation,
    Stored,
    adapter_of,
    call_adapters,
    feed_adapters,
    keep_bits,
    load_dense,
)
from rewrite.runtime.fallback import Calls
from rewrite.runtime.graft import Graft, Regime
from rewrite.runtime.originals import Originals
from rewrite.runtime.regimes import Handles

_STATE = "_rewrite"
Tensor = torch.Tensor


@dataclass
class Attachment:
    """What is attached to a model: kept on the model itself, copied with it, gone after merge and remove."""

    spec: str
    grafts: tuple[Graft, ...]
    sites: tuple[Mapping[str, Any], ...] = ()  # the plan as rows, for files and tables
    requires_grad: dict[str, bool] = field(default_factory=dict)  # as it was before
    originals: Originals = field(default_factory=Originals)
    order: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the parameters of parametrised modules
    calls: Calls = field(default_factory=Calls)
    steps: int = 0  # optimizer steps that `rewrite.step` was told of
    memory: dict[str, dict[Any, Any]] = field(default_factory=dict)  # of schedules, by clause
    backend: str | None = None  # None until compiled
    notes: tuple[str, ...] = ()
    regimes: tuple[Regime, ...] = ()
    seen: Any = None  # arguments of the last training step, without numbers, where a regime asks for them
    resting: set[str] = field(default_factory=set)  # what trains but not now, by name
    handles: Handles = field(default_factory=Handles)  # hooks of an optimizer on what trains
    rules: tuple[Placed, ...] = ()  # about what a step keeps for its backward, by the path of the module
    runs: dict[str, side.Run] = field(default_factory=dict)  # of side networks, by clause


def attachment(model: nn.Module) -> Attachment | None:
    """What is attached to `model`, or None."""
    return model.__dict__.get(_STATE)


def require(model: nn.Module) -> Attachment:
    """What is attached to `model`; raises `RewriteError` when nothing is."""
    state = attachment(model)
    if state is None:
        raise RewriteError(f"nothing is attached to this {type(model).__name__}: call rewrite.attach or compile first")
    return state


def attach(
    model: nn.Module,
    grafts: Sequence[Graft],
    *,
    spec: str,
    policies: Sequence[Regime] = (),
    sites: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    values: Mapping[str, Tensor] | None = None,
    rules: Sequence[Placed] = (),
) -> nn.Module:
    """Attach `grafts` to `model` in place and freeze everything else.

    `policies` say how what trains is trained, `rules` what a step keeps for its backward (`runtime.keeping`).

    `values` (by name, as `adapter_state` gives them) replace the initialisers, for loading.
    """
    if attachment(model) is not None:
        raise RewriteError("this model is adapted already: rewrite.remove or rewrite.merge it first")
    state = Attachment(spec, tuple(grafts), tuple(sites), notes=tuple(notes), regimes=tuple(policies))
    state.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.__dict__[_STATE] = state
    try:
        model.requires_grad_(False)
        # Initialisers want the weights as they were.
        ordered, shared = tqdm(grafts, desc="attach", delay=2, leave=False), dict[str, nn.Parameter]()
        made = {id(graft): _filled(model, graft, values, shared) for graft in ordered if graft.where in _ADAPTERS}
        if values is None:
            side.start(model, [a for a in made.values() if isinstance(a, side.SidePart) and not _bare(a)])
        for graft in sorted(grafts, key=lambda g: g.stage):
            _ATTACH[graft.where](model, graft, made.get(id(graft)), values, state)
        regimes.start(model, state)
        state.rules, state.notes = tuple(rules), (*state.notes, *keeping.place(model, rules))
        huggingface.adopt(model)
    except BaseException:
        remove(model)
        raise
    return model


_ADAPTERS: dict[str, type[Adapter]] = {
    "input": Branch,
    "output": Branch,
    "tokens": Branch,
    "past": Branch,
    "weight": Reparametrisation,
    "side": side.SidePart,
}


def _bare(adapter: nn.Module) -> bool:
    """Whether its tensors have no values."""
    return any(t.is_meta for t in adapter.parameters())


def _filled(
    model: nn.Module, graft: Graft, values: Mapping[str, Tensor] | None, shared: dict[str, nn.Parameter]
) -> Adapter:
    """A new adapter on the module's device with its initial values, or those of a checkpoint."""
    module = model.get_submodule(graft.path)
    weight = operator.attrgetter(graft.tensor)(module) if graft.tensor else next(module.parameters())
    new = [n for n, slot in graft.slots.items() if slot.shared and slot.shared not in shared]
    adapter = _ADAPTERS[graft.where](graft, weight.device, shared)
    adapter.train(module.training)
    if weight.device.type == "meta":
        return adapter
    with torch.no_grad():
        if values is not None:
            for name, slot in graft.slots.items():
                if not slot.shared or name in new:
                    getattr(adapter, name).copy_(values[graft.key(name)])
            return adapter
        for name in new:
            if (fill := graft.slots[name].fill) is not None:
                fill(getattr(adapter, name))
        if graft.initialise is not None:
            graft.initialise(graft.view(weight.detach()) if graft.tensor else weight.detach(), adapter.tensors())
    return adapter


def _attach_output(model: nn.Module, graft: Graft, adapter, values, state: Attachment) -> None:
    module = model.get_submodule(graft.path)
    if not isinstance(module._modules.get(ADAPTERS), Adapters):
        if hasattr(module, ADAPTERS):
            raise RewriteError(f"{graft.path} has an attribute {ADAPTERS!r} of its own: cannot attach there")
        module.add_module(ADAPTERS, Adapters())
    if graft.where == "output" and call_adapters not in module._forward_hooks.values():
        module.register_forward_hook(call_adapters, with_kwargs=True)
    if graft.where == "input" and feed_adapters not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(feed_adapters, with_kwargs=True)
    if graft.where in ("tokens", "past"):
        prompts.hook(module)
    if graft.where == "side":
        side.hook(model, graft, adapter, state.runs)
    adapters: Any = module._modules[ADAPTERS]
    adapters[graft.name] = adapter


def _attach_weight(model: nn.Module, graft: Graft, adapter, values, state: Attachment) -> None:
    shared = {id(original(model.get_submodule(path), graft.tensor)) for path in graft.places}
    if len(shared) > 1:
        raise RewriteError(
            f"{', '.join(graft.places)} do not share {graft.tensor}: {graft.label} cannot be one for all"
        )
    for path in graft.places:
        module = _parametrised(model, path, state)
        parametrize.register_parametrization(module, graft.tensor, adapter, unsafe=True)


def _attach_storage(model: nn.Module, graft: Graft, adapter, values, state: Attachment) -> None:
    module = _parametrised(model, graft.path, state)
    weight = module.get_parameter(graft.tensor)
    state.originals.keep(f"{graft.path}.{graft.tensor}", weight)
    parametrize.register_parametrization(module, graft.tensor, Stored(graft, weight.dtype), unsafe=True)
    held: Any = module._modules["parametrizations"]
    held[graft.tensor].__dict__["_apply"] = types.MethodType(keep_bits, held[graft.tensor])


def _parametrised(model: nn.Module, path: str, state: Attachment) -> nn.Module:
    """The module at a path, ready to be parametrised: its order of parameters noted, dense weights loadable."""
    module = model.get_submodule(path)
    if path not in state.order:
        state.order[path] = tuple(module._parameters)
        module.register_load_state_dict_pre_hook(load_dense)
    return module


def _attach_train(model: nn.Module, graft: Graft, adapter, values, state: Attachment) -> None:
    module = model.get_submodule(graft.path)
    for name in graft.slots:
        parameter = module.get_parameter(name)
        parameter.requires_grad_(True)
        if values is not None and graft.key(name) in values:
            regimes.keep(state.originals, graft.key(name), parameter)
            with torch.no_grad():
                parameter.copy_(values[graft.key(name)])


_ATTACH: dict[str, Callable[..., None]] = {
    "input": _attach_output,
    "output": _attach_output,
    "tokens": _attach_output,
    "past": _attach_output,
    "side": _attach_output,
    "weight": _attach_weight,
    "storage": _attach_storage,
    "train": _attach_train,
}


def original(module: nn.Module, tensor: str) -> nn.Parameter | None:
    """The parameter behind a tensor that `weight` grafts may reparameterise; None where it is stored otherwise."""
    if (own := module._parameters.get(tensor)) is not None:
        return own
    held: Any = module._modules.get("parametrizations")
    return held[tensor]._parameters.get("original") if held is not None and tensor in held else None


def adapted_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module, list[Adapter]]]:
    """(path, module, adapters) of every module that holds adapters on its input or output."""
    for path, module in model.named_modules():
        if isinstance(held := module._modules.get(ADAPTERS), Adapters):
            yield path, module, [a for a in held.values() if isinstance(a, Adapter)]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that an adapter checkpoint holds, by name: adapter tensors and trained base tensors.

    Names do not depend on how a graft takes hold: `<module>.adapters.<graft>.<slot>`, `<module>.<tensor>`.
    """
    state, found = require(model), {}
    for graft in state.grafts:
        module = model.get_submodule(graft.path)
        if graft.where == "train":
            found |= {graft.key(name): module.get_parameter(name) for name in graft.slots}
        elif graft.where != "storage":
            adapter = adapter_of(module, graft)
            found |= {graft.key(name): getattr(adapter, name) for name in graft.slots}
    first = {id(value): name for name, value in reversed(found.items())}  # a shared tensor goes by its first name
    return {name: value.detach() for name, value in found.items() if first[id(value)] == name}


def remove(model: nn.Module) -> nn.Module:
    """Take everything of ours off `model`, in place: base tensors and `requires_grad` as they were, bit for bit."""
    state = require(model)
    for graft in state.grafts:
        for path in graft.places:
            _restore(model.get_submodule(path), path, graft, state)
    return strip(model)


def _restore(module: nn.Module, path: str, graft: Graft, state: Attachment) -> None:
    ours = graft.where in ("weight", "storage") and path in state.order  # not those of an attach that failed
    if ours and parametrize.is_parametrized(module, graft.tensor):
        value = original(module, graft.tensor)  # it is frozen: as it was, and the same object for all that share it
        if value is None:
            value = nn.Parameter(_kept(state, f"{path}.{graft.tensor}", getattr(module, graft.tensor)), False)
        put_back(module, graft.tensor, value, state.order[path])
    for name in graft.slots if graft.where == "train" else ():
        if (key := graft.key(name)) in state.originals:
            with torch.no_grad():
                parameter = module.get_parameter(name)
                parameter.copy_(_kept(state, key, parameter))


def _kept(state: Attachment, key: str, now: Tensor) -> Tensor:
    """A base tensor as it was, where and of the dtype that the model is `now`: it may have been moved or cast."""
    if now.device.type == "meta":  # there are no numbers to bring back
        return torch.empty_like(now)
    if key not in state.originals:
        raise RewriteError(f"the original of {key} was not kept: it was on the meta device when attached")
    return state.originals.restore(key).to(now.device, now.dtype)


def put_back(module: nn.Module, name: str, value: nn.Parameter, order: Sequence[str]) -> None:
    """Replace the parametrised `name` by the parameter `value`, in its place: optimizers and files go by the order."""
    shared = type(module)  # by the copies of a model; removing takes the tensor off the class
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))  # type: ignore[assignment]
    parametrised: Any = module._modules["parametrizations"]
    parametrised[name] = parametrize.ParametrizationList([nn.Identity()], value, unsafe=True)  # nothing to evaluate
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    held = module._parameters
    for key in (*order, *[k for k in held if k not in order]):
        if key in held:
            held[key] = held.pop(key)


_HOOKS = (call_adapters, feed_adapters, prompts.feed, prompts.forget, *side.HOOKS)


def strip(model: nn.Module) -> nn.Module:
    """Remove adapters, hooks and marks without touching base tensors; restores `requires_grad`."""
    state = require(model)
    captures.forget(model)
    state.handles.release()
    for key in [k for k, hook in model._forward_pre_hooks.items() if hook is regimes.watch]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for _, module, _ in list(adapted_modules(model)):
        delattr(module, ADAPTERS)
    side.unhook(model)
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if hook in _HOOKS]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook in _HOOKS]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [k for k, h in module._load_state_dict_pre_hooks.items() if getattr(h, "hook", None) is load_dense]:
            del module._load_state_dict_pre_hooks[key]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(name, False))
        parameter.grad = None if not parameter.requires_grad else parameter.grad
    keeping.take_off(model)
    huggingface.release(model)
    del model.__dict__[_STATE]
    if isinstance(model._compiled_call_impl, CompiledCallBase):
        model._compiled_call_impl = None
    return model


class CompiledCallBase:
    """Marks a compiled call as ours, so that `strip` takes it off."""
