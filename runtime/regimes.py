"""Which of what trains is at work now.  What rests is frozen: no gradient, no optimizer state, no part in the backward.

A compiled graph belongs to one choice of what is at work, since Dynamo guards on `requires_grad`: as many different
choices as a regime makes, so many graphs (`captures` counts them, `recompile_limit` makes room for them).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from rewrite.errors import RewriteError
from rewrite.passes.record import GraphRecord
from rewrite.runtime.adapter import Adapter, adapter_of
from rewrite.runtime.graft import Graft, Regime
from rewrite.runtime.originals import Originals

if TYPE_CHECKING:
    from rewrite.runtime.attach import Attachment

Tensor = torch.Tensor
Loss = Callable[[], Any]
Count = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], list[GraphRecord]]


class Handles(list[Any]):
    """Hooks on the tensors of one model; its copies have none of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Handles:
        return Handles()

    def release(self) -> None:
        """Take them off."""
        for handle in self:
            handle.remove()
        self.clear()


@dataclass
class Trained:
    """One tensor that trains, under all the names that grafts have for it."""

    parameter: nn.Parameter
    grafts: list[tuple[Graft, str]]  # with the slot

    @property
    def names(self) -> list[str]:
        return [graft.key(slot) for graft, slot in self.grafts]


def trained(model: nn.Module, grafts: Sequence[Graft]) -> list[Trained]:
    """Every tensor that trains, at work or not, in the order of the grafts."""
    found: dict[int, Trained] = {}
    for graft in grafts:
        if graft.where == "storage":
            continue
        module = model.get_submodule(graft.path)
        holder = module if graft.where == "train" else adapter_of(module, graft)
        for name, slot in graft.slots.items():
            value = getattr(holder, name)
            if slot.trainable and isinstance(value, nn.Parameter):
                found.setdefault(id(value), Trained(value, [])).grafts.append((graft, name))
    return list(found.values())


def grouped(regime: Regime, tensors: Sequence[Trained]) -> list[list[Trained]]:
    """What trains in the groups of a regime; what is in no group, or in several, is at work always."""
    if not regime.groups:
        return [[t] for t in tensors]
    return [[t for t in tensors if all(n.startswith(f"{path}.") for n in t.names)] for path in regime.groups]


def start(model: nn.Module, state: Attachment) -> None:
    """The first choice of every regime, and copies of the base tensors that are now at work."""
    if any(regime.counts for regime in state.regimes):
        model.register_forward_pre_hook(watch, with_kwargs=True)
    advance(model, state)
    for tensor in trained(model, state.grafts):
        if tensor.parameter.requires_grad:
            _keep(state, tensor)


def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: what the last training batch was like, without its numbers."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        module.__dict__["_rewrite"].seen = tree_map_only(Tensor, lambda t: t.detach().to("meta"), (args, kwargs))


def advance(
    model: nn.Module,
    state: Attachment,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    count: Count | None = None,
) -> None:
    """Let every regime that chooses do so, after step number `state.steps`; `count` counts a training step."""
    for regime in state.regimes:
        if regime.choose is None:
            continue
        groups = grouped(regime, trained(model, state.grafts))
        memory = state.memory.setdefault(regime.clause, {})
        if "seed" not in memory:
            memory["seed"] = int(torch.randint(2**62, ()))
        chosen = regime.choose(Moment(model, state, regime, groups, memory, optimizer, loss, count))
        if chosen is not None:
            _set_to_work(state, groups, chosen, optimizer)


def _set_to_work(
    state: Attachment,
    groups: Sequence[Sequence[Trained]],
    chosen: Collection[int],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    state.resting = {t.names[0] for n, group in enumerate(groups) if n not in chosen for t in group}
    for tensor in (t for group in groups for t in group):
        parameter, works = tensor.parameter, tensor.names[0] not in state.resting
        if works and held is not None and id(parameter) not in held:
            raise RewriteError(
                f"{tensor.names[0]} begins to train, and the optimizer does not hold it: make it with "
                "rewrite.optimizer(model, ...) or from rewrite.parameter_groups(model, ...)"
            )
        parameter.requires_grad_(works)
        if works:
            _keep(state, tensor)
            continue
        parameter.grad = None
        if optimizer is not None:
            optimizer.state.pop(parameter, None)


def _keep(state: Attachment, tensor: Trained) -> None:
    graft, slot = tensor.grafts[0]
    if graft.where == "train":
        keep(state.originals, graft.key(slot), tensor.parameter)


def keep(originals: Originals, name: str, parameter: Tensor) -> None:
    """Keep a base tensor as it is before it first changes."""
    if name not in originals and parameter.device.type != "meta":
        originals.keep(name, parameter)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one gradient: its own, and those that take the backward pass from the one before down to it.

    `group` is what the tensor belongs to; None for the input of a graph that another one comes before.
    """

    group: int | None
    own: int
    chain: int


@dataclass(frozen=True)
class Costs:
    """FLOPs of a training step: of the forward, and of every gradient, from the loss downwards."""

    forward: int
    gradients: tuple[Cost, ...]

    @property
    def backward(self) -> int:
        return sum(c.own + c.chain for c in self.gradients)


@dataclass
class Moment:
    """What a regime can look at when it chooses: after step number `step`, or before the first one (0).

    `memory` is its own and kept from step to step; `groups` are the tensors that rest and work together.
    """

    model: nn.Module
    state: Attachment
    regime: Regime
    held: Sequence[Sequence[Trained]]
    memory: dict[Any, Any]
    optimizer: torch.optim.Optimizer | None = None
    loss: Loss | None = None
    count: Count | None = None
    groups: list[list[nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = [[t.parameter for t in group] for group in self.held]

    @property
    def step(self) -> int:
        return self.state.steps

    def random(self, *numbers: int) -> torch.Generator:
        """Random numbers of this regime, other ones for other `numbers`, the same ones for the same."""
        seed = self.memory["seed"]
        for number in numbers:
            seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return torch.Generator().manual_seed(seed)

    def costs(self) -> Costs:
        """What the gradients of the groups cost in a training step like the last one, counted on its joint graph."""
        if self.state.seen is None or self.count is None:
            raise RewriteError(f"{self.regime.clause} counts what a training step costs, and none has been taken")
        records = [r for r in self.count(self.model, *self.state.seen) if "gradients" in r.counts]
        names = {name: id(p) for name, p in self.model.named_parameters(remove_duplicate=False)}
        groups = {id(p): n for n, group in enumerate(self.groups) for p in group}
        found = [
            Cost(groups.get(names.get(c["name"], 0)), c["own"], c["chain"])
            for record in reversed(records)
            for c in record.counts["gradients"]
        ]
        return Costs(sum(r.counts["forward_flops"] for r in records), tuple(found))

    @torch.no_grad()
    def measured(self, factors: Mapping[int, float]) -> float:
        """The loss, in evaluation mode, while the adapters of some groups do only a part of what they do."""
        if self.loss is None:
            raise RewriteError(
                f"{self.regime.clause} measures losses after this step: "
                "rewrite.step(model, optimizer, loss=lambda: model(**batch).loss)"
            )
        gates = [(gate, factor) for n, factor in factors.items() for gate in self._gates(n)]
        before = [gate.clone() for gate, _ in gates]
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            for gate, factor in gates:
                gate.mul_(factor)
            return float(self.loss())
        finally:
            for (gate, _), value in zip(gates, before, strict=True):
                gate.copy_(value)
            for module in training:
                module.training = True

    def _gates(self, group: int) -> list[Tensor]:
        """The gates of the adapters in a group, each once."""
        grafts = {id(graft): graft for t in self.held[group] for graft, _ in t.grafts if graft.gated}
        holders: list[Adapter] = [adapter_of(self.model.get_submodule(g.path), g) for g in grafts.values()]
        return [holder.gate for holder in holders]  # type: ignore[misc]
