"""Training steps of a model that are counted, not run: any size, any spec, on a laptop.

The model is copied without its numbers; specs are resolved against the copy once and attached to copies of it, so
that what a user holds is never touched.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite import inventory, lower, planning
from rewrite.errors import Error, RewriteError
from rewrite.folders import inputs_of
from rewrite.inventory import Inventory
from rewrite.runtime import attach as attaching
from rewrite.runtime.dry_run import without_numbers
from rewrite.runtime.holdings import Held, holdings
from rewrite.runtime.scaling import Counts, counted
from rewrite.spec import Spec
from rewrite.structure.inputs import Inputs

_PER_TOKEN = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification")
_PER_ROW = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True)
class Estimate:
    """What a model holds with a spec attached, and what one training step of it takes."""

    spec: str
    held: tuple[Held, ...]
    counts: Counts
    notes: tuple[str, ...] = ()


class Estimator:
    """Counts training steps of one model on one batch.

    Example: `Estimator(model, batch_of(model, 512, 1)).estimate("lora(r=8)@attn.q,v").counts.saved_bytes`
    """

    def __init__(self, model: nn.Module, batch: Inputs) -> None:
        self.given = without_numbers(model)
        self.batch = _bare(batch)
        self.bare = without_numbers(self.given)
        if attaching.attachment(self.bare) is not None:
            attaching.remove(self.bare)

    @functools.cached_property
    def inventory(self) -> Inventory:
        """What the base is made of: found out once for all specs."""
        return inventory.take(self.bare)

    def attached(self, spec: str | Spec) -> nn.Module:
        """A copy of the base, without numbers, with `spec` attached."""
        planned = planning.resolve(self.inventory, spec, sum(p.numel() for p in self.bare.parameters()))
        return lower.attach(without_numbers(self.bare), planned)

    def estimate(self, spec: str | Spec) -> Estimate:
        """The base with `spec` attached."""
        return self.counted(self.attached(spec))

    def as_it_is(self) -> Estimate:
        """The model with what is attached to it."""
        return self.counted(without_numbers(self.given))

    def full(self) -> Estimate:
        """Full fine-tuning of the base."""
        model = without_numbers(self.bare)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        return self.counted(model)

    def counted(self, model: nn.Module) -> Estimate:
        """A step of a copy of the base, as it is adapted."""
        state = attaching.attachment(model)
        model.train()
        try:
            counts = counted(model, self.batch.args, self.batch.kwargs, self.inventory.blocks)
        except Error:
            raise
        except Exception as error:  # whatever a forward raises where there are no numbers
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            raise RewriteError(
                f"a step of {type(model).__name__} cannot be counted without numbers: {reason}"
            ) from error
        return Estimate(state.spec if state else "", tuple(holdings(model)), counts, state.notes if state else ())


def batch_of(model: Any, tokens: int, rows: int) -> Inputs:
    """Inputs of `rows` rows of `tokens` tokens (or of images), with labels where the model takes some, for a Hugging
    Face model; raises `RewriteError` for others."""
    if not hasattr(model, "main_input_name") or not hasattr(model, "config"):
        name = type(model).__name__
        raise RewriteError(f"what {name} is called with is not known: pass inputs={{...}}, a batch of the sizes meant")
    found = inputs_of(model, rows, tokens)
    parameters, name = inspect.signature(model.forward).parameters, type(model).__name__
    if "labels" in parameters and name.endswith(_PER_TOKEN):
        found["labels"] = found.get("decoder_input_ids", found.get("input_ids", torch.empty(0)))
    elif "labels" in parameters and name.endswith(_PER_ROW):
        found["labels"] = torch.zeros(rows, dtype=torch.int64, device="meta")
    if "use_cache" in parameters:
        return Inputs((), {**found, "use_cache": False})
    return Inputs((), dict(found))


def _bare(batch: Inputs) -> Inputs:
    def bare(value: Any) -> Any:
        return value.detach().to("meta") if isinstance(value, torch.Tensor) else value

    return Inputs(tuple(map(bare, batch.args)), {name: bare(value) for name, value in batch.kwargs.items()})
