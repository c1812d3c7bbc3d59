"""Adapter checkpoints: `adapter.safetensors` + `rewrite.json`, written atomically, read strictly.

`rewrite.json` holds the canonical spec, the site table, versions and a fingerprint of the base's shapes.
A file that does not fit is refused as a whole: every missing, extra or misshapen tensor is listed first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import nn

from rewrite.codegen.files import write
from rewrite.errors import RewriteError
from rewrite.runtime.adapter import Adapters
from rewrite.runtime.attach import adapter_state, attachment, require
from rewrite.version import __version__

TENSORS, CONFIG = "adapter.safetensors", "rewrite.json"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """An adapter checkpoint as read: the spec, the fingerprint of its base, and the tensors by name."""

    folder: Path
    spec: str
    fingerprint: str
    sites: tuple[Mapping[str, Any], ...]
    tensors: dict[str, torch.Tensor]


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters and trained base tensors of `model` to `folder` (created when missing)."""
    state, place = require(model), Path(folder)
    tensors = {name: value.cpu().contiguous() for name, value in adapter_state(model).items()}
    config = {
        "format": _FORMAT,
        "spec": state.spec,
        "fingerprint": fingerprint(model),
        "model": type(model).__name__,
        "sites": list(state.sites),
        "versions": {"rewrite": __version__, "torch": torch.__version__},
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
        write(place / TENSORS, to_bytes(_untied(tensors), metadata={"format": "pt", "spec": state.spec}))
        write(place / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise RewriteError(f"cannot save the adapter to {place}: {error}") from error


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses shared storages: a tensor that appears under two names is written twice."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        out[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return out


def read(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint; raises `RewriteError` that names the file and what is wrong with it."""
    place = Path(folder)
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        data = (place / TENSORS).read_bytes()
        tensors = load(data)
    except FileNotFoundError as error:
        raise RewriteError(f"{place} holds no adapter: {Path(error.filename).name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RewriteError(f"{place / CONFIG} is damaged: {error}") from error
    except SafetensorError as error:
        raise RewriteError(f"{place / TENSORS} is damaged or truncated: {error}") from error
    except OSError as error:
        raise RewriteError(f"cannot read the adapter in {place}: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("spec"), str):
        raise RewriteError(f"{place / CONFIG} is damaged: it has no spec")
    if not isinstance(config.get("sites", []), list):
        raise RewriteError(f"{place / CONFIG} is damaged: its sites are no list")
    if config.get("format") != _FORMAT:
        raise RewriteError(
            f"{place / CONFIG} has format {config.get('format')!r}, this version reads {_FORMAT}: upgrade peft-rewrite"
        )
    if _written_for(data) not in (None, config["spec"]):
        raise RewriteError(f"{place} holds the tensors of one save and the {CONFIG} of another: save the adapter again")
    return Checkpoint(place, config["spec"], str(config.get("fingerprint")), tuple(config.get("sites", ())), tensors)


def _written_for(data: bytes) -> str | None:
    """The spec in the header of a safetensors file that has been read without an error."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("spec")


def check_base(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raise `RewriteError` unless the base has the shapes that the checkpoint was trained on."""
    found = fingerprint(model)
    if found != checkpoint.fingerprint:
        raise RewriteError(
            f"{checkpoint.folder} was saved from a base of other shapes "
            f"(fingerprint {checkpoint.fingerprint[:12]}, this {type(model).__name__} has {found[:12]})"
        )


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `RewriteError` that lists everything missing, extra or of another shape."""
    found = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    lines = [f"missing  {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"extra    {name} {shape}" for name, shape in found.items() if name not in expected]
    lines += [
        f"shape    {name}: file {found[name]}, model {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    if lines:
        shown = "\n  ".join(lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else []))
        raise RewriteError(f"the adapter in {checkpoint.folder} does not fit, nothing was loaded:\n  {shown}")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of the base's parameters and buffers; adapters do not change it."""
    entries = sorted(f"{name} {shape}" for name, shape in base_shapes(model).items())
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the base's own parameters by the names they have without us."""
    found: dict[str, tuple[int, ...]] = {}
    ours = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Adapters))
    for path, module in model.named_modules():
        if f"{path}.".startswith(ours):
            continue
        prefix, inner, tensor = path.rpartition("parametrizations.")
        if inner:  # a parametrised tensor counts under its own name, once
            owner, name = prefix.rstrip("."), tensor.split(".")[0]
            found[f"{owner}.{name}" if owner else name] = tuple(_logical(model, owner, name))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{path}.{name}" if path else name] = tuple(parameter.shape)
    return found


def _logical(model: nn.Module, owner: str, name: str) -> tuple[int, ...]:
    """The shape of a parametrised tensor, from its storage graft where it has one: nothing is decoded."""
    state = attachment(model)
    for graft in state.grafts if state else ():
        if graft.path == owner and graft.tensor == name and graft.where in ("storage", "weight"):
            return graft.shape
    return tuple(getattr(model.get_submodule(owner), name).shape)
