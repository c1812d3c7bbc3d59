"""An adapted model as a PEFT folder that `PeftModel.from_pretrained` reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rewrite.codegen.files import write
from rewrite.errors import RewriteError
from rewrite.method import Method
from rewrite.peft.config import CONFIG, TENSORS, Config
from rewrite.peft.keys import ROWS, Made, entries, parts, tensor_of, tensors_of, tuned_paths, zeros_of
from rewrite.peft.targets import by_path, suffixed
from rewrite.peft.tuner import Part, Tuner, tuners
from rewrite.runtime.attach import original, require
from rewrite.runtime.graft import Graft

Tensor = torch.Tensor
_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT keeps their base weight where it adapts them by these names


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter of a model as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    What is stored in 4 bits is the base's matter and not part of the file.  Raises `RewriteError` for what PEFT cannot
    express: a part of a fused weight, two methods, several named adapters, methods that it does not have.
    """
    state, place = require(model), Path(folder)
    made = parts(model, state.grafts)
    config = configuration(model, made, state.grafts)
    tensors = _tensors(model, made, state.grafts) | _embeddings(model, made, config)
    ready = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        place.mkdir(parents=True, exist_ok=True)
        write(place / TENSORS, to_bytes(ready, metadata={"format": "pt"}))
        write(place / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise RewriteError(f"cannot save the adapter to {place}: {error}") from error


def configuration(model: nn.Module, made: Sequence[Made], grafts: Sequence[Graft]) -> dict[str, Any]:
    """The fields of `adapter_config.json` for the adapters of a model."""
    if not made and any(graft.where == "train" for graft in grafts):
        return _tuned(model, grafts)
    tuner = _one_tuner(made, grafts)
    rows = {part.path: list(method.ids) for _, method, each, part in made if each.type == ROWS and each is not tuner}  # type: ignore[attr-defined]
    made = [entry for entry in made if entry[2] is tuner]
    modules = {part.path.removesuffix(".out_proj") if part.kind == "attention.out" else part.path for *_, part in made
               if part.kind != "parameter"}  # fmt: skip
    bare = [f"{part.path}.{graft.tensor}" for graft, _, _, part in made if part.kind == "parameter"]
    config = _head(model, tuner, modules)
    if tuner.bias_only:
        config["bias"] = "none"
    if "prompt" in tuner.kinds:
        del config["target_modules"]
    if bare:
        config["target_parameters"] = bare
    config |= _fields(tuner, [(method, part) for _, method, _, part in made])
    if rows:
        config["trainable_token_indices"] = rows
    tuner.finish(config, [(method, part) for _, method, _, part in made])
    trained = [graft for graft in grafts if graft.where == "train"]
    adapted = [part.path for *_, part in made if part.kind != "parameter"]
    return config | _trained(model, trained, adapted, tuner)


def _one_tuner(made: Sequence[Made], grafts: Sequence[Graft]) -> Tuner:
    kinds = {tuner.type: tuner for _, _, tuner, _ in made}
    if len(kinds) > 1 and "LORA" in kinds:  # LoRA has a field for them
        kinds.pop(ROWS, None)
    labels = {graft.adapter for graft in grafts if graft.where != "storage"}
    if not made:
        raise RewriteError("this model has no adapter that PEFT has a file for: rewrite.save keeps what is trained")
    if len(kinds) > 1:
        raise RewriteError(f"PEFT keeps one method in a folder, this model has {' and '.join(kinds)}")
    if len(labels) > 1:
        raise RewriteError("PEFT keeps one adapter in a folder, and the clauses of this model have several names")
    seen: set[str] = set()
    for graft, _, _, _ in made:
        at = f"{graft.path}.{graft.tensor}"
        if at in seen:
            raise RewriteError(f"{at} has two adapters: PEFT keeps one in a folder")
        seen.add(at)
    attention = {p.path.removesuffix(".out_proj") for *_, p in made if p.kind == "attention.out"}
    if lone := attention ^ {p.path for *_, p in made if p.kind == "attention"}:
        raise RewriteError(f"PEFT adapts all of nn.MultiheadAttention or nothing: {min(lone)} is adapted in part")
    return next(iter(kinds.values()))


def _tuned(model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Any]:
    """The fields for modules that are trained as they are, and nothing else."""
    tuner, tuned = tuners()["LN_TUNING"], tuned_paths(grafts)
    if any(graft.adapter for graft in grafts):
        raise RewriteError("PEFT has no name for modules that are trained as they are")
    rest = _trained(model, [g for g in grafts if g.where == "train"], (), tuner)
    if rest.get("bias"):
        raise RewriteError("PEFT trains biases beside an adapter only: rewrite.save keeps them")
    saved = [path for path in rest["modules_to_save"] if path not in tuned]
    return _head(model, tuner, tuned) | ({"modules_to_save": saved} if saved else {})


def _head(model: nn.Module, tuner: Tuner, modules: Iterable[str]) -> dict[str, Any]:
    return {
        "peft_type": tuner.type,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "target_modules": _selecting(model, modules),
    }


def _fields(tuner: Tuner, found: Sequence[tuple[Method, Part]]) -> dict[str, Any]:
    """The fields on which all methods agree, and patterns for those that may differ from layer to layer."""
    main: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {}
    differing: dict[str, dict[str, Any]] = {}
    for method, part in found:
        if part.kind == "attention.out":  # goes by the attention that holds it
            continue
        for name, value in tuner.fields(method, part).items():
            if isinstance(value, list):
                lists.setdefault(name, []).extend(value)
            elif name not in main:
                main[name] = value
            elif main[name] != value and name in tuner.patterns:
                path = part.path if part.kind != "parameter" else f"{part.path}.{part.graft.tensor}"
                key = path if tuner.dotted else f"^{re.escape(path)}"
                differing.setdefault(tuner.patterns[name], {})[key] = value
            elif main[name] != value:
                raise RewriteError(f"PEFT has one {name} in a folder: {main[name]}, or {value} at {part.path}")
    if tuner.dotted:
        _check_dotted(tuner, found, Config(main | differing))
    return main | lists | differing


def _check_dotted(tuner: Tuner, found: Sequence[tuple[Method, Part]], config: Config) -> None:
    """The key of a layer there is about others too whose paths end in it."""
    for method, part in found:
        for name, value in tuner.fields(method, part).items():
            field = tuner.patterns.get(name, "")
            patterns = config.get(field, {})
            if (
                by_path(Config({field: dict(sorted(patterns.items()))}), field, part.path, config.get(name), True)
                != value
            ):
                raise RewriteError(f"PEFT has no {field} that says {value} at {part.path} and nothing else")


def _trained(model: nn.Module, trained: Sequence[Graft], modules: Iterable[str], tuner: Tuner) -> dict[str, Any]:
    """The fields for base tensors that are trained: whole modules, or the biases."""
    tensors: dict[str, set[str]] = {}
    for graft in trained:
        tensors.setdefault(graft.path, set()).update(graft.slots)
    whole, biased = [], set[str]()
    for path, names in tensors.items():
        module = model.get_submodule(path)
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if names == own and not is_parametrized(module):
            whole.append(path)
        elif names == {"bias"}:
            biased.add(path)
        else:
            raise RewriteError(f"PEFT trains modules or biases: of {path} only {', '.join(sorted(names))} is trained")
    found: dict[str, Any] = {}
    if whole:
        found["modules_to_save"] = _saved(model, whole)
    if biased:
        every = {p for p, m in model.named_modules() if isinstance(m._parameters.get("bias"), nn.Parameter)} - {*whole}
        if biased == {p for p in modules if p in every} and tuner.bias_only:
            found["bias"] = tuner.bias_only
        elif biased == every:
            found["bias"] = "all"
        else:
            raise RewriteError("PEFT trains all biases, or those of the adapted layers: this model trains others")
    return found


def _saved(model: nn.Module, whole: Sequence[str]) -> list[str]:
    """The outermost of these modules, which PEFT copies with all that they hold; it compares ends of names."""
    outer = [path for path in whole if not any(path.startswith(f"{p}.") for p in whole)]
    for path in outer:
        held = [p for p, m in model.get_submodule(path).named_modules(prefix=path) if m._parameters]
        if loose := [p for p in held if p not in whole]:
            raise RewriteError(f"PEFT would train {loose[0]} too, which {path} holds")
        if others := [p for p, _ in model.named_modules() if p.endswith(path) and p not in outer]:
            raise RewriteError(f"PEFT would train {others[0]} too, whose name ends in {path}")
    return outer


def _selecting(model: nn.Module, wanted: Iterable[str]) -> list[str] | str:
    """The shortest names by which PEFT finds these modules and no others; one regular expression where names fail."""
    every = [path for path, _ in model.named_modules() if path and ".adapters" not in path]
    inside, found = set(wanted), list[str]()
    for path in sorted(inside):
        if suffixed(path, found):
            continue
        pieces = path.split(".")
        ends = [".".join(pieces[start:]) for start in range(len(pieces) - 1, -1, -1)]
        name = next((end for end in ends if all(p in inside for p in every if suffixed(p, [end]))), None)
        if name is None:  # other paths end in this one
            return "|".join(re.escape(p) for p in sorted(inside))
        found.append(name)
    return found


def _tensors(model: nn.Module, made: Sequence[Made], grafts: Sequence[Graft]) -> dict[str, Tensor]:
    dtype = next((slot.dtype for graft, *_ in made for slot in graft.slots.values()), None)
    if dtype is None and made:  # nothing is trained: the zeros are of the base's
        dtype = made[0][-1].module.get_parameter("weight").dtype
    found: dict[str, Tensor] = {name: torch.zeros(shape, dtype=dtype) for name, shape in zeros_of(made).items()}
    for graft, method, tuner, part in made:
        values = {name: value.detach() for name, value in tensors_of(model, graft).items()}
        found |= tuner.converted(method, part, values)
    for entry in entries(model, grafts):
        if entry.graft.where == "train":
            found[entry.name] = tensor_of(model, entry)
    return found


def _embeddings(model: nn.Module, made: Sequence[Made], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The base weights of adapted embeddings, which PEFT keeps where they are targeted by their usual names."""
    rows = any(tuner.type == ROWS for _, _, tuner, _ in made)
    if rows or not any(name in config.get("target_modules", ()) for name in _EMBEDDINGS):
        return {}
    found: dict[str, Tensor] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, getter)() if callable(getattr(model, getter, None)) else None
        part = next((part for *_, part in made if part.module is layer), None)
        if part is not None and (weight := original(part.module, "weight")) is not None:
            found[f"base_model.model.{part.prefix}base_layer.weight"] = weight
    return found
