"""Linear layers of Llama-3-8B with random numbers, adapted by a method, and what they compute in float64.

A case is a group of linear layers: `layer` has the seven of a decoder layer, which share inputs as they do there; the
others are copies of one shape, each with an input of its own, as many as it takes that a device's cache holds them not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
Key = tuple[int, str]
"""Which linear layer, and which tensor of its adapter."""

SHAPES: dict[str, tuple[int, int]] = {
    "q,o": (4096, 4096),
    "k,v": (4096, 1024),
    "gate,up": (4096, 14336),
    "down": (14336, 4096),
}
"""Inputs and outputs of the linear layers of Llama-3-8B."""
IN_A_LAYER = {"q,o": 2, "k,v": 2, "gate,up": 2, "down": 1}
LAYER = "layer"
PROJECTIONS = (
    ("q_proj", 0, "q,o"),
    ("k_proj", 0, "k,v"),
    ("v_proj", 0, "k,v"),
    ("o_proj", 1, "q,o"),
    ("gate_proj", 2, "gate,up"),
    ("up_proj", 2, "gate,up"),
    ("down_proj", 3, "down"),
)
"""Name, input and shape of the linear layers of a decoder layer."""
METHODS = ("lora", "dropout", "qlora", "nf4", "dora", "qdora", "s2ft", "multi")
DROPOUT, SCALE = 0.05, 2.0
MULTI = (1, 2, 1, 2)
"""Ranks of the adapters of `multi`, in halves of the case's."""
CACHE = {"cuda": 150 << 20, "cpu": 1 << 20}
"""Bytes of weights that no cache serves; on a CPU one layer of real size is more than that."""
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float64: 1e-10}
"""Largest relative error: some roundings of the dtype, each at most half its epsilon."""


class Place(NamedTuple):
    """One linear layer of a case: its name, which input it reads, inputs and outputs."""

    name: str
    feed: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Case:
    """What is measured: a method on linear layers of a shape, with so many tokens and such a rank."""

    method: str
    shape: str
    tokens: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shrink: int = 1  # divides every size, for machines that are small
    backend: str = "inductor"  # of ours: `aot_eager` where there is no compiler

    @property
    def quantised(self) -> bool:
        return self.method in ("qlora", "nf4", "qdora")

    @property
    def adapted(self) -> bool:
        return self.method != "nf4"

    @property
    def dropout(self) -> float:
        return DROPOUT if self.method == "dropout" else 0.0

    @property
    def ranks(self) -> list[int]:
        """The rank of every adapter: one, or several for `multi`."""
        return [max(1, self.rank * part // 2) for part in MULTI] if self.method == "multi" else [self.rank]

    @cached_property
    def places(self) -> list[Place]:
        sizes = {name: (k // self.shrink, n // self.shrink) for name, (k, n) in SHAPES.items()}
        if self.shape == LAYER:
            return [Place(name, feed, *sizes[shape]) for name, feed, shape in PROJECTIONS]
        k, n = sizes[self.shape]
        copies = max(1, math.ceil(CACHE[self.device.type] / (k * n * self.dtype.itemsize)))
        return [Place(f"copy{i}_proj", i, k, n) for i in range(min(copies, 20))]

    @property
    def sites(self) -> str:
        """The layers in a spec."""
        return "linear"

    @property
    def widths(self) -> list[int]:
        """The width of every input."""
        return [next(p.inputs for p in self.places if p.feed == i) for i in range(self.places[-1].feed + 1)]

    @property
    def rows(self) -> int:
        """Rows of the batch, which differ in their adapter for `multi`."""
        return min(8, self.tokens) if self.method == "multi" else 1

    def channels(self, place: Place) -> int:
        """Trained columns for S2FT: as many as are a multiple of 16 and about 1 % of the inputs."""
        return max(16, place.inputs // 100 // 16 * 16)

    def sliced(self, place: Place) -> bool:
        """Whether S2FT trains columns of it: of the layers that heads and channels feed."""
        return self.shape != LAYER or place.name in ("o_proj", "down_proj")

    def described(self) -> dict[str, Any]:
        """For a result."""
        found = {"method": self.method, "shape": self.shape, "tokens": self.tokens, "rank": self.rank}
        return {**found, "dtype": str(self.dtype).removeprefix("torch."), "linears": len(self.places)}

    def __str__(self) -> str:
        rank = f" r{self.rank}" if self.adapted and self.method != "s2ft" else ""
        return f"{self.method} {self.shape} {self.tokens} tokens{rank}"


class Linears(nn.Module):
    """The frozen linear layers of a case; a call gives the output of each."""

    def __init__(self, case: Case, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.feeds = [(p.name, p.feed) for p in case.places]
        for place, W in zip(case.places, weights, strict=True):
            layer = nn.Linear(place.inputs, place.outputs, bias=False, device="meta")
            layer.weight = nn.Parameter(W.clone(), requires_grad=False)
            setattr(self, place.name, layer)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(xs[feed]) for name, feed in self.feeds)


class Batch(NamedTuple):
    """Inputs that want a gradient, and the gradient of every output."""

    xs: list[Tensor]
    dys: list[Tensor]


class Problem:
    """The numbers of a case: weights, what every adapter holds, and batches; the same for every contender."""

    sample: dict[str, Any] | None = None
    """A batch by which a compiler looks at the model, where its signature does not do."""

    def __init__(self, case: Any, seed: int = 0) -> None:
        self.case: Case = case
        self.random = torch.Generator(case.device).manual_seed(seed)
        self.weights = self.drawn()
        self.theta: dict[Key, Tensor] = {}
        for i, place in enumerate(case.places):
            self.theta |= {(i, name): value for name, value in self.adapter(i, place).items()}
        self.batches = [self.batch() for _ in range(2)]
        self.adapters = [row % len(case.ranks) for row in range(case.rows)]

    def drawn(self) -> list[Tensor]:
        """The frozen weights."""
        return [self.normal((p.outputs, p.inputs), p.inputs**-0.5).to(self.case.dtype) for p in self.case.places]

    def fresh(self) -> nn.Module:
        """A frozen model with these weights, for one contender."""
        return Linears(self.case, self.weights)

    def call(self, model: Callable[..., Any], *xs: Tensor) -> Sequence[Tensor]:
        """Outputs of a model, whatever it is wrapped in."""
        return model(*xs)

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.case.device).mul_(std)

    def adapter(self, i: int, place: Place) -> dict[str, Tensor]:
        """What the adapter of a layer trains; nothing is zero, as nothing is after a step of training."""
        case, found = self.case, dict[str, Tensor]()
        if not case.adapted or (case.method == "s2ft" and not case.sliced(place)):
            return found
        if case.method == "s2ft":
            return {"D": self.normal((place.outputs, case.channels(place)), place.inputs**-0.5)}
        for k, rank in enumerate(case.ranks):
            at = str(k) if case.method == "multi" else ""
            found["A" + at] = self.normal((rank, place.inputs), place.inputs**-0.5)
            found["B" + at] = self.normal((place.outputs, rank), 0.5 * rank**-0.5)
        if case.method in ("dora", "qdora"):
            V = self.weights[i].float() + SCALE * (found["B"] @ found["A"])
            found["m"] = torch.linalg.vector_norm(V, dim=1) * (1 + self.normal((place.outputs,), 0.1))
        return found

    def batch(self) -> Batch:
        case = self.case
        rows = (case.rows, case.tokens // case.rows)
        xs = [self.normal((*rows, k), 1).to(case.dtype).requires_grad_() for k in case.widths]
        return Batch(xs, [self.normal((*rows, p.outputs), 1).to(case.dtype) for p in case.places])


class Found(NamedTuple):
    """Outputs, gradients of the inputs, and gradients of what is trained."""

    ys: list[Tensor]
    dxs: list[Tensor]
    gradients: dict[Key, Tensor]


def reference(
    problem: Problem,
    weights: Sequence[Tensor],
    batch: Batch,
    theta: dict[Key, Tensor],
    masks: Sequence[Tensor | None] | None = None,
    columns: dict[int, slice] | None = None,
) -> Found:
    """The case in float64, by the formulas; `masks` are of dropout, one for every layer, and already scaled."""
    case = problem.case
    theta = {key: value.detach().double().requires_grad_() for key, value in theta.items()}
    xs = [x.detach().double().requires_grad_() for x in batch.xs]
    ys: list[Tensor] = []
    for i, place in enumerate(case.places):
        x, W = xs[place.feed], weights[i].double()
        own = {name: value for (at, name), value in theta.items() if at == i}
        ys.append(output(case, x, W, own, masks[i] if masks else None, problem.adapters, (columns or {}).get(i)))
    leaves = [*xs, *theta.values()]
    gradients = torch.autograd.grad(ys, leaves, [dy.double() for dy in batch.dys])
    trained = dict(zip(theta, gradients[len(xs) :], strict=True))
    return Found([y.detach() for y in ys], list(gradients[: len(xs)]), trained)


def output(
    case: Case, x: Tensor, W: Tensor, own: dict[str, Tensor], mask: Tensor | None, adapters: list[int], at: slice | None
) -> Tensor:
    """One layer by the formula of its method."""
    if "m" in own:
        V = W + SCALE * (own["B"] @ own["A"])
        return F.linear(x, (own["m"] / torch.linalg.vector_norm(V, dim=1).detach())[:, None] * V)
    y = F.linear(x, W)
    if case.method == "multi" and own:
        updates = [SCALE * F.linear(F.linear(x[r : r + 1], own[f"A{k}"]), own[f"B{k}"]) for r, k in enumerate(adapters)]
        return y + torch.cat(updates)
    if "D" in own:
        return y + F.linear(x[..., at], own["D"])
    if "A" in own:
        return y + SCALE * F.linear(F.linear(x if mask is None else x * mask, own["A"]), own["B"])
    return y
