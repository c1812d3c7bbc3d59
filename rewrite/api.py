"""The public functions: each is the shortest way through the floors below for one thing that a user wants."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rewrite import inventory, lower, peft, planning
from rewrite.bind import canonical, valued
from rewrite.errors import RewriteError, SpecError
from rewrite.estimate import batch_of
from rewrite.fitting import fit
from rewrite.method import Method
from rewrite.methods import registry
from rewrite.parser import parse as parse_text
from rewrite.parser import parse_sites
from rewrite.planning import Plan
from rewrite.runtime import attach as attaching
from rewrite.runtime import checkpoint, compiled, export
from rewrite.runtime.graft import Graft
from rewrite.sitemap import SiteMap, site_map
from rewrite.spec import Spec, known_role
from rewrite.structure.inputs import Inputs

log = logging.getLogger(__name__)
Batch = Inputs | Mapping[str, Any] | Sequence[Any]
"""A batch for one forward: keyword arguments as a mapping, positional ones as a sequence."""


def parse(text: str) -> Spec:
    """Parse a spec and check its methods and arguments; raises `SpecError` with a caret under what is wrong.

    >>> str(parse("lora( r = 8 )@attn.q,attn.v+nf4(base)"))
    'lora(r=8)@attn.q,v + nf4(base)'
    """
    spec = parse_text(text)
    planning.read(spec)
    return valued(parse_text(canonical(spec, registry())), registry())


def methods() -> dict[str, type[Method]]:
    """Every method by the name it has in a spec.

    >>> "lora" in methods()
    True
    """
    return dict(registry())


def plan(model: nn.Module, spec: str | Spec, *, inputs: Batch | None = None) -> Plan:
    """What `spec` would do to `model`, as a printable table; attaches nothing.

    A spec without a method, as in `plan(model, "attn.q")`, shows the sites that it selects.  What a model computes is
    found out from one forward under fake tensors; `inputs` is the batch for it (keyword arguments as a mapping,
    positional ones as a tuple), where the one made from the model's signature does not do.
    """
    found = inventory.take(model, _batch(inputs))
    if isinstance(spec, str) and _only_sites(spec):
        return site_map(found, spec)
    return _plan(model, spec, found)


def sites(model: nn.Module, *, inputs: Batch | None = None) -> SiteMap:
    """Every site of `model` with the words that select it, as a printable table (docs/sites.md)."""
    return site_map(inventory.take(model, _batch(inputs)))


def _plan(model: nn.Module, spec: str | Spec, found: inventory.Inventory) -> Plan:
    return planning.resolve(found, spec, sum(p.numel() for p in model.parameters()))


def _batch(inputs: Batch | None) -> Inputs | None:
    return None if inputs is None else Inputs.of(inputs)


def _only_sites(text: str) -> bool:
    """Whether a text names sites and no method."""
    try:
        terms = parse_sites(text).terms
    except SpecError:
        return False
    return all(t.kind != "role" or (t.text not in registry() and known_role(t.text)) for t in terms)


def attach(model: nn.Module, spec: str | Spec, *, inputs: Batch | None = None) -> nn.Module:
    """Put the adapters and storage that `spec` names on `model`, in place, and freeze the rest.

    The model stays an instance of its class and works with or without `torch.compile(model, backend="rewrite")`.
    `inputs` as in `plan`.
    """
    return lower.attach(model, _plan(model, spec, inventory.take(model, _batch(inputs))))


def compile(
    model: nn.Module,
    spec: str | Spec,
    *,
    inputs: Batch | None = None,
    backend: str = "inductor",
    dynamic: bool | None = True,
    mode: str | None = None,
    chunked_loss: bool = True,
    memory: str | int | None = None,
    tokens: int | None = None,
    batch: int = 1,
) -> nn.Module:
    """`attach(model, spec)`, and let `model(...)` run compiled; the same instance comes back.

    `backend`: `inductor`, `aot_eager`, or `eager` (our rewritten graph as it is, for debugging).  `dynamic` and `mode`
    as in `torch.compile`: `mode="reduce-overhead"` replays CUDA graphs, which pays where a step is many small kernels
    (few tokens) and wants `dynamic=False`; other backends and the CPU run as without it.  `chunked_loss`: a training
    step computes head and cross entropy in chunks of rows and keeps no logits; `output.logits` are computed when they
    are read (docs/loss.md).  `inputs` as in `plan`.  With `memory` (bytes, or `"12GiB"`), what a training step on
    `batch` rows of `tokens` tokens (or on `inputs`) needs beside the spec to fit is added to it and said:
    recomputation, saved activations or a base in fewer bits, fewer adapted blocks (docs/memory.md).  A failed compile
    leaves the model as it was.

    Example: `model = rewrite.compile(model, "lora(r=8)@attn.q,v + nf4(base)")`
    """
    compiled.check_backend(backend)
    compiled.check_mode(mode)
    note = ""
    if memory is not None:
        if tokens is None and inputs is None:
            raise RewriteError("memory=... is counted on a batch: say how many tokens=..., or pass inputs={...}")
        sample = Inputs.of(inputs) if inputs is not None else batch_of(model, tokens or 1, batch)
        found = fit(model, spec, memory, sample)
        spec, note = found.spec, found.note
        log.warning("%s", note)
    planned = _plan(model, spec, inventory.take(model, _batch(inputs)))
    planned = replace(planned, notes=(*planned.notes, note)) if note else planned
    return compiled.compile_model(lower.attach(model, planned), backend, dynamic, chunked_loss, mode)


def apply(program: ExportedProgram, spec: str | Spec) -> ExportedProgram:
    """`spec` spliced into a `torch.export`ed program, where the graph is all there is; returns a new program.

    Adapter parameters are named as on a live model; a planned site that the graph does not compute is an error.

    Example: `adapted = rewrite.apply(torch.export.export(model, (ids,)), "lora(r=8)@attn.q,v")`
    """
    planned = planning.resolve(inventory.take_exported(program), spec)
    if rules := lower.rules(planned):
        clause = rules[0][1].label
        raise RewriteError(f"'{clause}' is about what a training step saves, an exported program is no training step")
    return export.apply_grafts(program, lower.grafts(planned))


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters and trained base tensors of `model` to a folder, atomically."""
    checkpoint.save(model, folder)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load an adapter: onto a bare base (attaches what was saved) or into a model with the same spec, in place.

    Strict: everything missing, extra or of another shape is listed, and nothing is half loaded.
    """
    found = checkpoint.read(folder)
    checkpoint.check_base(found, model)
    state = attaching.attachment(model)
    if state is not None and state.spec != found.spec:
        raise RewriteError(
            f"{found.folder} holds '{found.spec}', this model has '{state.spec}': rewrite.remove(model) first"
        )
    if state is not None:
        current = attaching.adapter_state(model)
        checkpoint.check_tensors(found, {n: tuple(t.shape) for n, t in current.items()})
        for name, tensor in current.items():
            tensor.copy_(found.tensors[name])
        return model
    planned = _plan(model, found.spec, inventory.take(model))
    checkpoint.check_tensors(found, _expected(lower.grafts(planned)))
    return lower.attach(model, planned, found.tensors)


def load_peft(model: nn.Module, folder: str | os.PathLike[str], *, inputs: Batch | None = None) -> nn.Module:
    """Attach the adapter in a Hugging Face PEFT folder to a bare model, with its tensors; the model comes back.

    Strict: every field of its configuration is translated or refused by name, every tensor is used.  `inputs` as in
    `plan`.

    Example: `model = rewrite.load_peft(model, "adapters/alpaca-lora")`
    """
    return peft.load(model, folder, _batch(inputs))


def save_peft(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` as a folder that `PeftModel.from_pretrained` reads, with its keys and shapes.

    Raises `RewriteError` with the reason for adapters that PEFT cannot express.
    """
    peft.save(model, folder)


def _expected(grafts: list[Graft]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of these grafts, without attaching them."""
    found: dict[str, tuple[int, ...]] = {}
    shared: set[str] = set()  # held once, under the name of the first graft that has it
    for graft in grafts:
        for slot, wanted in graft.slots.items():
            if wanted.shared in shared:
                continue
            shared |= {wanted.shared} - {""}
            found[graft.key(slot)] = wanted.held
    return found
