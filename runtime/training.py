"""What adapters do around a training loop: rank schedules, regularisers, and their own learning rates.

A plain loop calls `step` after `optimizer.step()` and adds `regulariser` to its loss; `trainer_callback` does both for
the Hugging Face `Trainer`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.runtime import regimes
from rewrite.runtime.attach import Attachment, adapter_of, require
from rewrite.runtime.dry_run import dry_run
from rewrite.runtime.graft import Graft

Tensor = torch.Tensor


@torch.no_grad()
def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, loss: regimes.Loss | None = None) -> int:
    """Run every schedule (rank budgets, masks, blocks at work) once, after `optimizer.step()` and before gradients are
    cleared.

    Where a schedule puts an entry or a tensor to rest, the optimizer's state of it is cleared too.  `loss()` is the
    loss on a batch, for schedules that measure (`ist`).  Returns the number of this step, from 1.  Without any schedule
    it only counts.  Raises `RewriteError` where a tensor begins to train that the optimizer does not hold.

    Example: `loss.backward(); optimizer.step(); rewrite.step(model, optimizer); optimizer.zero_grad()`
    """
    state = require(model)
    state.steps += 1
    for grafts in _clauses(state).values():
        for tensor, entries in _scheduled(model, state, grafts):
            _forget(optimizer, tensor, entries)
    regimes.advance(model, state, optimizer, loss, dry_run)
    return state.steps


def _scheduled(model: nn.Module, state: Attachment, grafts: list[Graft]) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the schedules of one clause: the tensors that they change, with the entries that are something else now."""
    behaviour = grafts[0].behaviour
    assert behaviour is not None
    if behaviour.schedule is not None:
        held = [_held(model, graft) for graft in grafts]
        memory = state.memory.setdefault(behaviour.clause, {})
        yield from behaviour.schedule(state.steps, held, memory) or ()
    for graft in grafts if behaviour.reselect is not None else ():
        yield from behaviour.reselect(state.steps, functools.partial(_adapted, model, graft), _held(model, graft)) or ()  # type: ignore[misc]


def _adapted(model: nn.Module, graft: Graft) -> Tensor:
    """The matrix of a graft as it has adapted it so far."""
    module = model.get_submodule(graft.path)
    weight = getattr(module, graft.tensor).detach()
    if graft.where != "weight":  # which the module's tensor has in it
        assert graft.merged is not None
        weight, _ = graft.merged(weight, None, *adapter_of(module, graft).operands())
    matrix = graft.view(weight)
    return matrix.float() if matrix.dtype.itemsize < 4 else matrix


def regulariser(model: nn.Module) -> Tensor:
    """The sum over clauses of the mean over their sites of what methods add to the loss; 0 where none does.

    Example: `loss = model(**batch).loss + rewrite.regulariser(model)`
    """
    state = require(model)
    terms: list[Tensor] = []
    for grafts in _clauses(state).values():
        behaviour = grafts[0].behaviour
        if behaviour is None or behaviour.regulariser is None:
            continue
        found = [behaviour.regulariser(**_leading(model, graft)) for graft in grafts]
        terms.append(torch.stack([t for t in found if t is not None]).mean())
    if not terms:
        first = next(model.parameters(), torch.zeros(()))
        return torch.zeros((), device=first.device)
    return torch.stack(terms).sum()


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, adapter: str | None = None
) -> list[dict[str, Any]]:
    """Groups for a `torch.optim` optimizer over what trains, now or later, with the rates that methods ask for.

    `lr` and `weight_decay` are those of an ordinary tensor: a method may multiply the first (LoRA+: B learns faster)
    and refuse the second.  `adapter` keeps the tensors of one named adapter.

    Example: `torch.optim.AdamW(rewrite.parameter_groups(model, lr=2e-4, weight_decay=0.01))`
    """
    state, groups = require(model), defaultdict(list)
    if adapter is not None and adapter not in {g.adapter for g in state.grafts}:
        raise RewriteError(f"this model has no adapter '{adapter}'")
    for tensor in regimes.trained(model, [g for g in state.grafts if adapter is None or g.adapter == adapter]):
        if tensor.parameter.requires_grad or tensor.names[0] in state.resting:
            graft, name = tensor.grafts[0]
            slot = graft.slots[name]
            groups[slot.lr, slot.decay].append(tensor.parameter)
    return [
        {"params": found, "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        for (factor, decays), found in groups.items()
    ]


def gradient_of(model: nn.Module) -> str:
    """What the gradients of a model are, as its spec says: `exact`, `zeroth` or `fused`."""
    return next((r.gradient for r in require(model).regimes if r.gradient != "exact"), "exact")


def trainer_callback() -> Any:
    """A callback for the Hugging Face `Trainer` that runs schedules and regularisers.

    Raises `RewriteError` when training begins and the `Trainer` cannot do what the spec says: hand it the optimizer
    that the spec asks for, `optimizers=(rewrite.optimizer(model, torch.optim.AdamW, lr=2e-4), None)`.

    Example: `Trainer(model, args, train_dataset=data, callbacks=[rewrite.trainer_callback()])`
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
        ) -> None:
            if (reason := _unfit(model, args, getattr(optimizer, "optimizer", optimizer))) is not None:
                raise RewriteError(f"the Trainer cannot do what '{require(model).spec}' says: {reason}")

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            term = regulariser(model)
            if term.requires_grad:  # the loss was taken already: its gradient is added to theirs
                term.backward()

        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
        ) -> None:
            data = kwargs.get("train_dataloader")
            step(model, getattr(optimizer, "optimizer", optimizer), loss=lambda: _loss_on_another(model, data))

    return Callback()


def _unfit(model: nn.Module, args: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """Why the Hugging Face `Trainer` cannot train a model with these arguments and this optimizer, or None."""
    state, gradient = require(model), gradient_of(model)
    if gradient == "zeroth":
        return "it runs a backward pass, and mezo has none: write a loop with rewrite.optimizer(model, ...)"
    missing = {id(t.parameter) for t in regimes.trained(model, state.grafts) if t.names[0] in state.resting}
    missing -= {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing or (gradient == "fused" and not state.handles):
        return "its own optimizer holds what trains now: optimizers=(rewrite.optimizer(model, cls, lr=...), None)"
    if gradient == "exact":
        return None
    if args.gradient_accumulation_steps > 1:
        return "fused_update updates in every backward pass: gradient_accumulation_steps=1"
    if args.max_grad_norm:
        return "fused_update has freed the gradients before their norm is known: max_grad_norm=0"
    if any(g.behaviour is not None and g.behaviour.regulariser is not None for g in state.grafts):
        return "a regulariser is added after the backward pass, and fused_update has updated by then"
    return None


def _loss_on_another(model: nn.Module, data: Any) -> Any:
    """The loss on one more batch, without any trace in the random state."""
    with torch.random.fork_rng():
        batch = next(iter(data))
    output = model(**batch)
    return output["loss"] if isinstance(output, dict) else output.loss


def _clauses(state: Attachment) -> dict[str, list[Graft]]:
    """The grafts of every clause whose method does more than its maths."""
    found: dict[str, list[Graft]] = {}
    for graft in state.grafts:
        if graft.behaviour is not None:
            found.setdefault(graft.behaviour.clause, []).append(graft)
    return found


def _held(model: nn.Module, graft: Graft) -> dict[str, Tensor]:
    """The tensors of a graft as they are held, with their gradients."""
    adapter = adapter_of(model.get_submodule(graft.path), graft)
    return {name: getattr(adapter, name) for name in graft.slots}


def _leading(model: nn.Module, graft: Graft) -> dict[str, Tensor]:
    return adapter_of(model.get_submodule(graft.path), graft).tensors()


def _forget(optimizer: torch.optim.Optimizer | None, tensor: Tensor, entries: Tensor) -> None:
    """Clear the optimizer's state of some entries of a tensor: moments of what they were before."""
    for value in (optimizer.state.get(tensor, {}) if optimizer is not None else {}).values():
        if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
            value.masked_fill_(entries, 0)
