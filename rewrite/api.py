"""The public functions: each is the shortest way through the floors below for one thing that a user wants."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rewrite import inventory, lower, planning
from rewrite.bind import canonical
from rewrite.errors import RewriteError
from rewrite.method import Method
from rewrite.methods import registry
from rewrite.parser import parse as parse_text
from rewrite.planning import Plan
from rewrite.runtime import attach as attaching
from rewrite.runtime import checkpoint, compiled, export
from rewrite.runtime.adapter import ADAPTERS
from rewrite.runtime.graft import Graft
from rewrite.spec import Spec


def parse(text: str) -> Spec:
    """Parse a spec and check its methods and arguments; raises `SpecError` with a caret under what is wrong.

    >>> str(parse("lora( r = 8 )@attn.q,attn.v+nf4(base)"))
    'lora(r=8)@attn.q,v + nf4(base)'
    """
    spec = parse_text(text)
    planning.read(spec)
    return Spec(parse_text(canonical(spec, registry())).clauses, text)


def methods() -> dict[str, type[Method]]:
    """Every method by the name it has in a spec.

    >>> sorted(methods())[:3]
    ['full', 'lora', 'nf4']
    """
    return dict(registry())


def plan(model: nn.Module, spec: str | Spec) -> Plan:
    """What `spec` would do to `model`, as a printable table; attaches nothing."""
    count = sum(p.numel() for p in model.parameters())
    return planning.resolve(inventory.take(model), spec, count)


def attach(model: nn.Module, spec: str | Spec) -> nn.Module:
    """Put the adapters and storage that `spec` names on `model`, in place, and freeze the rest.

    The model stays an instance of its class and works with or without `torch.compile(model, backend="rewrite")`.
    """
    return _attach(model, plan(model, spec))


def _attach(model: nn.Module, planned: Plan, values: dict[str, Any] | None = None) -> nn.Module:
    return attaching.attach(
        model,
        lower.grafts(planned),
        spec=planned.spec,
        sites=planned.rows(),
        notes=planned.notes,
        values=values,
    )


def compile(model: nn.Module, spec: str | Spec, *, backend: str = "inductor", dynamic: bool | None = True) -> nn.Module:
    """`attach(model, spec)`, and let `model(...)` run compiled; the same instance comes back.

    `backend`: `inductor`, `aot_eager`, or `eager` (our rewritten graph as it is, for debugging).  `dynamic` as in
    `torch.compile`.  A failed compile leaves the model as it was.

    Example: `model = rewrite.compile(model, "lora(r=8)@attn.q,v + nf4(base)")`
    """
    compiled.check_backend(backend)
    return compiled.compile_model(attach(model, spec), backend, dynamic)


def apply(program: ExportedProgram, spec: str | Spec) -> ExportedProgram:
    """`spec` spliced into a `torch.export`ed program, where the graph is all there is; returns a new program.

    Adapter parameters are named as on a live model; a planned site that the graph does not compute is an error.

    Example: `adapted = rewrite.apply(torch.export.export(model, (ids,)), "lora(r=8)@attn.q,v")`
    """
    planned = planning.resolve(inventory.take_exported(program), spec)
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
    planned = plan(model, found.spec)
    checkpoint.check_tensors(found, _expected(lower.grafts(planned)))
    return _attach(model, planned, found.tensors)


def _expected(grafts: list[Graft]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of these grafts, without attaching them."""
    found: dict[str, tuple[int, ...]] = {}
    for graft in grafts:
        for slot, wanted in graft.slots.items():
            inner = slot if graft.where == "train" else f"{ADAPTERS}.{graft.name}.{slot}"
            found[f"{graft.path}.{inner}" if graft.path else inner] = wanted.shape
    return found
