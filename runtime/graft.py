"""Grafts: all that the runtime knows about an adaptation of a model.

A graft says where (a module path and how it takes hold there), with which typed function, and with which
tensors.  Specs, methods and sites stay above; a graft carries closures that they made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rewrite.codegen.maps import LINEAR, LayerMap, Rows

Tensor = torch.Tensor
ADAPTERS = "adapters"
"""Name of the child module of an adapted layer that holds its adapters: `q_proj.adapters.lora.A`."""
Where = Literal["input", "output", "weight", "storage", "tokens", "past", "side", "train"]


@dataclass(frozen=True)
class Slot:
    """One tensor of a graft: shape, dtype, whether it trains, and how.

    Grafts whose slots have the same `shared` name hold one tensor, of the shape `whole`, and use its leading part.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True
    shared: str = ""
    lr: float = 1.0  # factor on the learning rate
    decay: bool = True
    whole: tuple[int, ...] = ()
    fill: Callable[[Tensor], Any] | None = None  # fills a shared tensor, once

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of the tensor that is held."""
        return self.whole or self.shape


def leading(tensor: Any, slot: Slot) -> Any:
    """The part of a shared tensor that one site uses."""
    if slot.held == slot.shape:
        return tensor
    for dim, (size, whole) in enumerate(zip(slot.shape, slot.held, strict=True)):
        tensor = tensor if size == whole else tensor.narrow(dim, 0, size)
    return tensor


@dataclass(frozen=True)
class Behaviour:
    """What a graft does in training besides its maths; grafts of one clause have the same `clause`.

    regulariser  tensors -> a term of the loss, or None
    schedule     `(step, [{slot: tensor} of each graft of the clause], memory) -> [(tensor, entries to forget)]`
    calibrated   `(W, {slot: tensor}, seen)` fills the tensors from what `calibration` asks for: inputs, their scales,
                 or gradients
    reselect     as `schedule`, for one graft: `(step, W, {slot: tensor})`, W() the matrix as adapted so far
    """

    clause: str
    regulariser: Callable[..., Any] | None = None
    schedule: Callable[[int, Sequence[Mapping[str, Tensor]], dict[Any, Any]], Any] | None = None
    calibration: Literal["inputs", "scales", "gradients"] | None = None
    calibrated: Callable[[Tensor, dict[str, Tensor], Any], None] | None = None
    reselect: Callable[[int, Callable[[], Tensor], dict[str, Tensor]], Any] | None = None


@dataclass(frozen=True)
class Regime:
    """How what trains is trained, as one clause of a spec says.

    choose     `(Moment) -> numbers of the groups that are at work from now on`, or None for those of before; it is
               asked when the model is attached and after every step (`runtime.regimes`).
    choices    how many different choices it makes at most, None where that is not known.
    groups     modules, by path, whose tensors rest and work together; none: every tensor is a group of its own.
    counts     it asks what gradients cost, so that a batch must be seen.
    gradient   `exact`; `zeroth`: estimated from losses alone, along `directions` at a distance of `eps`; `fused`:
               exact, and applied tensor by tensor inside the backward pass (`runtime.optimizers`).
    """

    clause: str
    choose: Callable[[Any], Collection[int] | None] | None = None
    choices: int | None = 1
    groups: tuple[str, ...] = ()
    counts: bool = False
    gradient: Literal["exact", "zeroth", "fused"] = "exact"
    eps: float = 0.0
    directions: int = 1


@dataclass(frozen=True)
class Source:
    """A matrix of the model that a side network starts from."""

    path: str
    tensor: str
    map: LayerMap
    rows: Rows | None


@dataclass(frozen=True)
class Wiring:
    """How a block puts its layers together, for rows of our own that go through them (`rewrite.runtime.rows`).

    `layers` are q, k, v, o, up, down, and gate where there is one; the norms stand in front of attention and
    feed-forward network where `pre`, and else behind what each adds.  `heads` are those of queries, of keys and values.
    """

    layers: Mapping[str, Source]
    norms: tuple[str, str]
    pre: bool
    activation: str
    heads: tuple[int, int]
    width: int


@dataclass(frozen=True)
class Side:
    """How a graft takes part in a side network; `rewrite.runtime.side` runs it.

    part      `entry`: in front of the first block of a stack; `rung`: behind a block; `end`: behind the stack; `late`:
              in front of its last block; `head`: behind the model's head; `memory`: behind a stack whose side network
              a decoder's reads.
    names     the tensors that the graft's `op` takes: `op(h, *tensors)` taps a stream, `op(y, s, *tensors)` joins one
    then      `then(s, t, call, {slot: tensor})` is the next state of the network behind a tap; at an end, where
              nothing is tapped, `then(s, call, {slot: tensor})` is what joins.
    start     `([{role: matrix}], [{slot: tensor}])` fills the tensors of all grafts of the clause from the weights.
    sources   the matrices of a block, by role
    wiring    how the block puts its layers together, where the network sends rows through them
    slot      which layer of a cache of past keys and values is this graft's; `layer` is the block's own
    """

    part: Literal["entry", "rung", "end", "late", "head", "memory"]
    net: str
    stack: str
    then: Callable[..., Any]
    names: tuple[str, ...] = ()
    causal: bool = False
    reads: bool = False  # the memory of another stack's network
    slot: int = 0
    layer: int = 0
    start: Callable[[Sequence[Mapping[str, Tensor]], Sequence[Mapping[str, Tensor]]], None] | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    wiring: Wiring | None = None


@dataclass(frozen=True)
class Graft:
    """One adaptation of one module.

    where      `input`: `op(x, *tensors, training=)` changes the module's input;
               `output`: `op(x, y, *read, *tensors, training=)` changes its output; it reads the module's tensors
               named in `reads`;
               `weight`: `op(W, *tensors)` reparameterises `tensor`;
               `tokens`: `op(*tensors, training=)` are embeddings (n, width) in front of the input of the model, whose
               embedding `tensor` is; `past`: keys and values (n, layers, 2, heads, width) before it; n is the number
               of rows of the first tensor (`runtime.prompts`);
               `side`: it is a part of a side network, as `side` says;
               `storage`: `op(*stored)` decodes `tensor`, `encode(W)` made the stored tensors;
               `train`: the base tensors named in `tensors` are trained, nothing is added.
    initialise `(W (..., d_out, d_in), {slot: tensor})` fills the tensors in place; W is the matrix, `rows`
               only.
    merged     `(weight, bias or None, *tensors) -> (weight, bias or None)` of a plain layer; None if there is none.
    adapter    the name by which `rewrite.use` switches it.
    gated      its op takes a gate after its tensors: a number that scales what it does.
    stage      grafts of one module take hold in the order of their stages.
    behaviour  what it does in training besides (`runtime.training`).
    tensor     the parameter of the module, stored with `shape`; `map` says how the module applies it.
    rows       rows of its matrix that the graft touches, None for all of them.
    sharers    other modules whose `tensor` is the same object: a `weight` graft takes hold there too, once.
    """

    path: str
    name: str
    where: Where
    op: Callable[..., Any] | None = None
    slots: Mapping[str, Slot] = field(default_factory=dict)
    initialise: Callable[[Tensor, dict[str, Tensor]], None] | None = None
    merged: Callable[..., tuple[Any, Any]] | None = None
    reads: tuple[str, ...] = ()
    adapter: str | None = None
    gated: bool = False
    stage: int = 0
    behaviour: Behaviour | None = None
    encode: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    read: Callable[[Mapping[str, Any], str], tuple[Tensor, ...] | None] | None = None  # a foreign checkpoint
    tensor: str = "weight"
    shape: tuple[int, ...] = ()  # of that tensor, as the module stores it
    map: LayerMap = LINEAR
    rows: Rows | None = None
    sharers: tuple[str, ...] = ()
    route: str = ""  # factored or materialised and why, where that was a choice
    side: Side | None = None
    label: str = ""  # how explain names it, e.g. "lora(r=8)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Graft:
        return self  # immutable; its closures are shared so that copies of a model share compiled code

    @property
    def places(self) -> tuple[str, ...]:
        """The modules that it takes hold of: its own first."""
        return (self.path, *self.sharers)

    def key(self, slot: str) -> str:
        """The name of one of its tensors in files; it does not depend on how the graft takes hold."""
        inner = slot if self.where == "train" else f"{ADAPTERS}.{self.name}.{slot}"
        return f"{self.path}.{inner}" if self.path else inner

    def view(self, weight: Tensor) -> Tensor:
        """The rows (..., d_out, d_in) that this graft touches, of the module's tensor."""
        matrix = self.map.matrix(weight)
        return matrix if self.rows is None else self.rows.take(matrix)
