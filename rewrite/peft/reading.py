"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read strictly onto a bare model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import nn

from rewrite import inventory, lower, planning
from rewrite.errors import ResolveError, RewriteError, SpecError
from rewrite.peft.config import OLD_TENSORS, TENSORS, Config
from rewrite.peft.config import read as read_config
from rewrite.peft.keys import Entry, entries, parts, tensor_of, zeros_of
from rewrite.peft.translate import from_config
from rewrite.peft.tuner import part_of, tuner_of
from rewrite.planning import Plan
from rewrite.runtime import attach as attaching
from rewrite.runtime.graft import Graft
from rewrite.structure.inputs import Inputs

Tensor = torch.Tensor
_SHOWN = 20


def load(model: nn.Module, folder: str | os.PathLike[str], inputs: Inputs | None = None) -> nn.Module:
    """Attach the adapter in a PEFT folder to a bare model, in place, with its tensors.

    Strict: what the configuration says is translated or refused by name, and every tensor of the file is used; all that
    is missing, left over or of another shape is listed in one `RewriteError`, and the model stays as it was.
    """
    if attaching.attachment(model) is not None:
        raise RewriteError("this model is adapted already: rewrite.remove or rewrite.merge it first")
    place = Path(folder)
    config, tensors = read_config(place), read_tensors(place)
    config = tuner_of(config).informed(config, tensors)
    planned = _plan(model, config, inputs)
    grafts = lower.grafts(planned)
    _check_called(model, planned, grafts, config)
    found = entries(model, grafts)
    tensors = _without_base(_without_zeros(tensors, model, grafts), model, config, grafts)
    _check(found, tensors, place)
    attaching.attach(model, grafts, spec=planned.spec, sites=planned.rows(), notes=planned.notes)
    with torch.no_grad():
        for entry in found:
            if entry.name not in tensors:
                continue
            held = tensor_of(model, entry)
            held.copy_(entry.key.read(tensors[entry.name]).to(held.dtype))
    return model


def _plan(model: nn.Module, config: Config, inputs: Inputs | None) -> Plan:
    spec = from_config(config, model)
    try:
        return planning.resolve(inventory.take(model, inputs), spec, sum(p.numel() for p in model.parameters()))
    except (ResolveError, SpecError) as error:
        raise RewriteError(f"{config.about} does not fit this {type(model).__name__}: {error}") from error


def _check_called(model: nn.Module, planned: Plan, grafts: Sequence[Graft], config: Config) -> None:
    """Raise `RewriteError` where PEFT's wrapper never runs: its file says what no forward of it computed."""
    for placed, graft in zip(planned.placements, grafts, strict=True):
        if graft.where in ("train", "storage", "tokens", "past") or placed.site.shared:
            continue
        part, place = part_of(model, graft, grafts), placed.site.place
        runs = type(part.module).forward is not nn.Module.forward if part.kind == "parameter" else place.called
        if not runs and not part.kind.startswith("attention") and not _scales(part.module):
            raise RewriteError(
                f"{config.about}: {place.path} is read without being called, or its call computes more than its weight "
                "does, so that PEFT's adapter there is another function"
            )


def _scales(module: nn.Module) -> bool:
    """Whether an embedding looks up and scales by its `embed_scale`, which PEFT applies to its adapter too."""
    scale: Any = getattr(module, "embed_scale", None)
    if not isinstance(module, nn.Embedding) or scale is None or module.weight.device.type == "meta":
        return False
    ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
    with torch.no_grad():
        return torch.equal(module(ids), module.weight[ids] * torch.as_tensor(scale).to(module.weight))


def read_tensors(place: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder by name."""
    file = place / TENSORS
    try:
        if not file.exists() and (place / OLD_TENSORS).exists():
            return torch.load(place / OLD_TENSORS, map_location="cpu", weights_only=True)
        return from_bytes(file.read_bytes())
    except FileNotFoundError as error:
        raise RewriteError(f"{place} holds no PEFT adapter: {TENSORS} is missing") from error
    except SafetensorError as error:
        raise RewriteError(f"{file} is damaged or truncated: {error}") from error
    except OSError as error:
        raise RewriteError(f"cannot read {file}: {error}") from error


def _without_zeros(tensors: dict[str, Tensor], model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
    """The tensors without those that are zero in every file."""
    zeros = zeros_of(parts(model, grafts))
    return {n: t for n, t in tensors.items() if n not in zeros or tuple(t.shape) != zeros[n] or bool(t.any())}


def _without_base(
    tensors: dict[str, Tensor], model: nn.Module, config: Config, grafts: Sequence[Graft]
) -> dict[str, Tensor]:
    """The tensors without those of the base that PEFT writes too; they must be those of this model."""
    base = dict(model.named_parameters(remove_duplicate=False))
    trained = {f"{g.path}.{name}" for g in grafts if g.where == "train" for name in g.slots}
    kept = {}
    for name, value in tensors.items():
        inside = name.removeprefix("base_model.model.")
        own = inside.replace(".base_layer.", ".")
        if any(part in inside for part in (".original_module.", ".modules_to_save.")):
            # With bias=all PEFT writes these biases again, under the names that they have in its wrapper.
            own = own.replace(".original_module.", ".").replace(".modules_to_save.", ".")
            if config.get("bias") == "all" and own in trained and inside.endswith(".bias"):
                continue
        elif ".base_layer." in inside and own in base and own not in trained:
            if base[own].shape == value.shape and torch.equal(base[own].detach().to(value), value.to(base[own].device)):
                continue
            raise RewriteError(
                f"{config.about} comes with another base weight {own} than this model has: load the base that it "
                "was trained on (with its vocabulary), then the adapter"
            )
        kept[name] = value
    return kept


def _check(found: Sequence[Entry], tensors: dict[str, Tensor], place: Path) -> None:
    expected = {entry.name: entry.shape for entry in found}
    optional = {entry.name for entry in found if entry.key.optional}
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    lines = [
        f"missing  {name} {shape}" for name, shape in expected.items() if name not in have and name not in optional
    ]
    lines += [f"extra    {name} {shape}" for name, shape in have.items() if name not in expected]
    lines += [
        f"shape    {name}: file {have[name]}, model {shape}"
        for name, shape in expected.items()
        if name in have and have[name] != shape
    ]
    if lines:
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        shown = "\n  ".join(lines[:_SHOWN] + more)
        raise RewriteError(f"the PEFT adapter in {place} does not fit, nothing was loaded:\n  {shown}")
