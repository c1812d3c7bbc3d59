"""What a PEFT tuner is: how its configuration becomes a method of ours, and which tensor of its files is which of ours.

A tuner is one small file in `rewrite/peft/tuners/`, found by discovery: a subclass of `Tuner` that says

- `type`, `methods`         PEFT's name for it, and the methods here that it may become
- `kinds`, `honours`        the kinds of modules that it wraps in PEFT, and the settings of convolutions that it obeys
- `arguments`, `patterns`   our arguments beside PEFT's fields with their defaults, and the fields of exceptions by path
- `starts`, `only`          fields that only say how an adapter starts, and those that must be at a certain value
- `tensors`                 our slots beside the names in a file

and where tables do not do, overrides `call` (the method for one module), `keys` (the tensors of one part of the model)
or `fields` (the way back).

Which modules are meant, files and their errors are not its business (`targets`, `translate`, `reading`, `writing`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from rewrite.codegen.maps import Convolution, Matmul
from rewrite.errors import RewriteError
from rewrite.layers import is_conv1d
from rewrite.method import Method
from rewrite.methods import registry
from rewrite.peft.config import Config
from rewrite.peft.targets import Target, by_path
from rewrite.runtime.attach import attachment
from rewrite.runtime.graft import Graft

Tensor = torch.Tensor
Kind = Literal[
    "linear", "embedding", "conv1d", "conv2d", "conv3d", "attention", "attention.out", "parameter", "prompt", "other"
]
Call = tuple[str, dict[str, Any]]
"""A method by name, and its arguments; strings stand as they are written in a spec."""


@dataclass(frozen=True)
class Part:
    """What one graft adapts, as PEFT sees it; `prefix` is where its tensors stand in a file."""

    path: str
    kind: Kind
    module: nn.Module
    graft: Graft
    prefix: str
    grafts: tuple[Graft, ...] = ()  # of the whole adapter

    @property
    def transposed(self) -> bool:
        """Whether the layer stores its weight as (d_in, d_out)."""
        return self.graft.map == Matmul(True)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution, () of any other layer."""
        return self.graft.map.kernel if isinstance(self.graft.map, Convolution) else ()

    @property
    def groups(self) -> int:
        """The groups of a convolution."""
        return self.graft.map.groups if isinstance(self.graft.map, Convolution) else 1

    def shape(self, slot: str) -> tuple[int, ...]:
        """The shape of one of its tensors here."""
        return self.graft.slots[slot].shape


@dataclass(frozen=True)
class Key:
    """A tensor of a file beside the slot that it fills: `peft(slot) == tensor`, `ours(tensor) == slot`."""

    slot: str
    name: str
    peft: Callable[[Tensor], Tensor] | None = None
    ours: Callable[[Tensor], Tensor] | None = None
    scope: Literal["part", "model", "file"] = "part"
    optional: bool = False

    def full(self, part: Part) -> str:
        """Its name in a file."""
        return {"part": f"base_model.model.{part.prefix}", "model": "base_model.", "file": ""}[self.scope] + self.name

    def written(self, value: Tensor) -> Tensor:
        """A tensor of ours as a file has it."""
        return value if self.peft is None else self.peft(value)

    def read(self, value: Tensor) -> Tensor:
        """A tensor of a file as we hold it."""
        return value if self.ours is None else self.ours(value)


def table(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """One of the tables of a tuner, which nobody changes."""
    return MappingProxyType(dict(entries))


def shaped(slot: str, name: str, part: Part, shape: tuple[int, ...]) -> Key:
    """A tensor that has another shape in a file, its numbers in the same order."""
    own = part.shape(slot)
    if own == shape:
        return Key(slot, name)
    return Key(slot, name, lambda t: t.reshape(shape), lambda t: t.reshape(own))


def reordered(slot: str, name: str) -> Key:
    """A matrix that a file holds transposed."""
    return Key(slot, name, lambda t: t.mT, lambda t: t.mT)


SIDES = frozenset({"sides", "padding by name"})


class Tuner:
    """Base class of the entries in `rewrite/peft/tuners/`."""

    type: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    honours: ClassVar[frozenset[str]] = (
        SIDES  # of groups, dilation, padding_mode, padding by name, sides of other sizes
    )
    transposed: ClassVar[bool] = False  # whether it takes transformers' `Conv1D`
    arguments: ClassVar[Mapping[str, tuple[str, Any]]] = MappingProxyType({})  # argument: (field, default)
    patterns: ClassVar[Mapping[str, str]] = MappingProxyType({})  # field: field of exceptions
    dotted: ClassVar[bool] = False  # whether these match whole paths, or what follows a dot, and nothing else
    starts: ClassVar[frozenset[str]] = frozenset()
    extra: ClassVar[frozenset[str]] = frozenset()  # further fields that `call` reads
    only: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = MappingProxyType({})
    trained: ClassVar[str] = ""  # where the tensors of modules stand that it trains as they are
    bias_only: ClassVar[str] = ""  # the value of `bias` that trains the biases of adapted layers
    tensors: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def reads(self) -> frozenset[str]:
        """The fields that are translated, or say nothing about what an adapter computes."""
        fields = {field for field, _ in self.arguments.values()}
        return self.starts | self.extra | fields | {*self.patterns.values()} | ({"bias"} if self.bias_only else set())

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        """The method for one module; without a target, for any, where the configuration treats all alike."""
        given = {}
        for argument, (field, default) in self.arguments.items():
            value = config.get(field, default)
            if target is not None and field in self.patterns:
                value = by_path(config, self.patterns[field], target.name, value, self.dotted)
            given[argument] = value
        return self.methods[0], given

    def parts(self, config: Config, target: Target, kind: Kind) -> list[tuple[str, Call]]:
        """(what a term names, method) of each part of a module that is adapted."""
        return [(target.name, self.call(config, target, kind))]

    def keys(self, method: Any, part: Part) -> list[Key]:
        """The tensors of a part in a file; slots that none of them fills start as they do in a new adapter."""
        return [Key(slot, name) for slot, name in self.tensors.items() if slot in part.graft.slots]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        """The fields of a configuration that stand for a method at a part."""
        return {field: getattr(method, argument) for argument, (field, _) in self.arguments.items()}

    def finish(self, config: dict[str, Any], made: Sequence[tuple[Any, Part]]) -> None:
        """Add to a configuration what depends on all parts."""

    def fits(self, method: Any, part: Part) -> str | None:
        """Why PEFT's file cannot hold a method at a part, or None."""
        return None

    def converted(self, method: Any, part: Part, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a part by their full names, as they are written."""
        return {key.full(part): key.written(values[key.slot]) for key in self.keys(method, part)}

    def constants(self, method: Any, part: Part) -> dict[str, tuple[int, ...]]:
        """Tensors of zeros that a file holds of a part, by name and shape."""
        return {}

    def informed(self, config: Config, tensors: Mapping[str, Tensor]) -> Config:
        """The configuration as its file has it, where the two may differ."""
        return config

    def refusal(self, module: nn.Module, kind: Kind) -> str | None:
        """Why PEFT's tuner does not adapt a module as it computes, or None."""
        name = type(module).__name__
        if kind not in self.kinds or (is_conv1d(type(module)) and not self.transposed):
            return f"{self.type} does not adapt {'an' if name[0] in 'AEIOU' else 'a'} {name}"
        if not kind.startswith("conv"):
            return None
        layer: Any = module
        settings = {
            "groups": layer.groups > 1, "dilation": max(layer.dilation) > 1,
            "padding_mode": layer.padding_mode != "zeros", "padding by name": isinstance(layer.padding, str),
            "sides": any(len({*each}) > 1 for each in (layer.kernel_size, layer.stride, layer.padding)),
        }  # fmt: skip
        broken = [setting for setting, used in settings.items() if used and setting not in self.honours]
        return f"PEFT's {self.type} does not compute with its {' and '.join(broken)} as it does" if broken else None


@functools.cache
def tuners() -> Mapping[str, Tuner]:
    """Every tuner by PEFT's name for it."""
    import rewrite.peft.tuners as folder

    found: dict[str, Tuner] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        loaded = importlib.import_module(f"{folder.__name__}.{module.name}")
        for value in vars(loaded).values():
            if inspect.isclass(value) and issubclass(value, Tuner) and value.__module__ == loaded.__name__:
                found[value.type] = value()
    return dict(sorted(found.items()))


def tuner_of(config: Config) -> Tuner:
    """The tuner of a configuration, whose methods are all here."""
    known = tuners()
    if config.type not in known:
        raise RewriteError(f"{config.about}: rewrite does not read {config.type} adapters; it reads {', '.join(known)}")
    return known[config.type]


def tuner_for(method: str) -> Tuner | None:
    """The tuner that writes a method."""
    return next((tuner for tuner in tuners().values() if method in tuner.methods), None)


def written(call: Call) -> str:
    """A method with its arguments as a spec has it; arguments at their default are left out.

    >>> written(("lora", {"r": 4, "alpha": 8.0, "dropout": 0.0}))
    'lora(r=4, alpha=8.0)'
    """
    name, given = call
    if name not in registry():
        raise RewriteError(f"rewrite has no method {name} to load this adapter as")
    defaults = {f.name: f.default for f in dataclasses.fields(registry()[name])}  # type: ignore[arg-type]
    shown = {k: v for k, v in given.items() if not (type(defaults[k]) is type(v) and defaults[k] == v)}
    return f"{name}({', '.join(f'{k}={_text(v)}' for k, v in shown.items())})" if shown else name


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return str(value) if not isinstance(value, float) else repr(value)


def number(config: Config, name: str, value: Any) -> float:
    """A field that must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise config.refuse(name, f"a number is expected, got {value!r}")
    return float(value)


_LAYERS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Linear, "linear"),
    (nn.Embedding, "embedding"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.MultiheadAttention, "attention"),
)


def kind_of(module: nn.Module) -> Kind:
    """The kind of layer that PEFT takes a module for."""
    if any(is_conv1d(cls) for cls in type(module).__mro__):  # a parametrised one is of a class of its own
        return "linear"
    for cls, kind in _LAYERS:
        if isinstance(module, cls):
            return kind
    return "other"


def part_of(model: nn.Module, graft: Graft, grafts: Sequence[Graft]) -> Part:
    """What a graft adapts, as PEFT sees it; `grafts` are all of the model."""
    module, path = model.get_submodule(graft.path), graft.path
    owner, _, leaf = path.rpartition(".")
    kind: Kind = kind_of(module)
    prefix = f"{path}."
    if graft.where in ("tokens", "past"):
        kind = "prompt"
    elif kind == "attention":
        kind = kind if graft.tensor == "in_proj_weight" else "other"
    elif leaf == "out_proj" and isinstance(model.get_submodule(owner), nn.MultiheadAttention):
        kind, prefix = "attention.out", f"{owner}.base_layer.out_proj."
    elif kind == "other" or graft.tensor != "weight":
        kind, prefix = "parameter", prefix + "base_layer." * _wrapped_later(model, module, graft, grafts)
    return Part(path, kind, module, graft, prefix, tuple(grafts))


def _wrapped_later(model: nn.Module, module: nn.Module, graft: Graft, grafts: Sequence[Graft]) -> int:
    """How many adapted parameters of a module come after this one: PEFT wraps each around those before."""
    state = attachment(model)
    order = (state.order.get(graft.path) if state else None) or tuple(module._parameters)
    adapted = {g.tensor for g in grafts if g.path == graft.path and g.slots and g.where != "train"}
    return sum(name in adapted for name in order[order.index(graft.tensor) + 1 :])


def method_of(graft: Graft) -> Method:
    """The method that a graft was made of."""
    from rewrite.planning import read

    _, bound = read(f"{graft.label}@linear")
    return bound[0].method
