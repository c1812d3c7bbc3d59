"""Batches to try a model's forward with, made from its signature, its configuration and its first layers.

Nothing here knows an architecture: only names of arguments, names of configuration fields and types of modules.
Whether a batch runs is for the caller to try; this module only makes them, likely ones first. It needs no
transformers: a configuration is anything with the fields.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rewrite.structure.about import About
from rewrite.structure.arguments import ARGUMENTS

TRIES = 12  # batches of one choice of arguments; of a model that has no configuration, four times as many


@dataclass(frozen=True, eq=False)
class Inputs:
    """What to call a model with: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(batch: Inputs | Mapping[str, Any] | Sequence[Any]) -> Inputs:
        """Keyword arguments as a mapping, positional ones as a sequence."""
        if isinstance(batch, Inputs):
            return batch
        return Inputs((), dict(batch)) if isinstance(batch, Mapping) else Inputs(tuple(batch))

    def __str__(self) -> str:
        named = [*((f"#{index}", value) for index, value in enumerate(self.args)), *self.kwargs.items()]
        return ", ".join(f"{name}={list(v.shape) if isinstance(v, Tensor) else v}" for name, v in named)


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Batches for one forward of `model`, best first.

    `next(candidates(LlamaForCausalLM(config)))` holds `input_ids` (2, 12) and `use_cache=False`.
    Tensors are on the device of the model's parameters, floating ones in their dtype; none asks for a gradient.
    A batch that does not run is no error here: the caller takes the next one.
    """
    about = About(model)
    parameters = _parameters(model)
    tries = TRIES if about.configs else 4 * TRIES
    constants = {"use_cache": False} if _takes_cache(model, about, parameters) else {}
    seen: set[str] = set()
    for choice in _choices(model, about, parameters):
        order = _in_step if "mm_token_type_ids" in choice else _combinations
        for values in itertools.islice(order(list(choice.values())), tries):
            kwargs = dict(zip(choice, values, strict=True))
            found = _inputs(kwargs, parameters, constants)
            key = f"{found} {[v.dtype for v in kwargs.values() if isinstance(v, Tensor)]}"
            if key not in seen:
                seen.add(key)
                yield found


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of the forward; of the wrapped module's, where a wrapper only passes everything on."""
    found = inspect.signature(model.forward).parameters
    named = {name: each for name, each in found.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    children = list(model.children())
    if not named and found and children and not isinstance(model, nn.Sequential):
        return _parameters(children[0])
    return named


def _takes_cache(model: nn.Module, about: About, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether the forward knows `use_cache`; one that only passes it on does if its configuration has it."""
    passing = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values())
    return "use_cache" in parameters or (passing and isinstance(about.get("use_cache"), bool))


def _inputs(kwargs: dict[str, Any], parameters: Mapping[str, inspect.Parameter], constants: dict[str, Any]) -> Inputs:
    positional = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_ONLY]
    args = tuple(kwargs[name] for name in positional if name in kwargs)
    return Inputs(args, {name: value for name, value in kwargs.items() if name not in positional} | constants)


def _combinations(variants: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Every combination, those of likely values first."""
    ranks = sorted(itertools.product(*(range(len(each)) for each in variants)), key=sum)
    yield from (tuple(each[rank] for each, rank in zip(variants, chosen, strict=True)) for chosen in ranks)


def _in_step(variants: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """First with first, second with second, ..., then every combination."""
    if all(variants):
        for index in range(max(map(len, variants))):
            yield tuple(each[min(index, len(each) - 1)] for each in variants)
    yield from _combinations(variants)


MODALITIES = r"input_ids|pixel_values|input_features|input_values|flattened_patches|past_values|sample|audio_mel"
EXTRAS = r"timesteps?|encoder_hidden_states|image_grid_thw|pooled_projections|bbox|past_(time_features|observed_mask)"
COMPANIONS = {
    "sample": re.compile(EXTRAS),
    "hidden_states": re.compile(EXTRAS + r"|class_labels"),
    "pixel_values": re.compile(r"image_grid_thw|mm_token_type_ids|spatial_shapes|pixel_attention_mask"),
    "input_ids": re.compile(r"bbox"),
    "past_values": re.compile(EXTRAS),
    "input_features": re.compile(r"feature_attention_mask"),
}

Choice = dict[str, list[Any]]


def _choices(model: nn.Module, about: About, parameters: Mapping[str, inspect.Parameter]) -> Iterator[Choice]:
    required = [name for name, each in parameters.items() if each.default is each.empty]
    modalities = [name for name in parameters if re.fullmatch(MODALITIES, name)]
    main = getattr(model, "main_input_name", None)
    main = main if isinstance(main, str) and main in parameters else None
    towers = [name for name in modalities if about.has(name)]
    sets: list[list[str]] = []
    if about.configs:
        sets += [towers] if "input_ids" in towers or len(towers) == 1 else []
        sets += [["input_ids", name] for name in towers if name != "input_ids" and "input_ids" in towers]
        sets += [[main]] if main else []
    sets += [[name] for name in modalities]
    sets += [[]]
    yield from _dummy(model, about, parameters)
    for names in sets:
        names = list(dict.fromkeys([*names, *(name for name in required if not _filled(name, names))]))
        names += [name for name in about.decoder_arguments(parameters) if name not in names]
        for first in list(names):
            pattern = COMPANIONS.get(first)
            names += [name for name in parameters if pattern and pattern.fullmatch(name) and name not in names]
        if "spatial_shapes" not in names:  # without, the mask is over pixels, and is seldom needed
            names = [name for name in names if name != "pixel_attention_mask" or name in required]
        if names:
            yield {name: list(_variants(name, names, about)) for name in parameters if name in names}


def _filled(name: str, names: Sequence[str]) -> bool:
    """Whether a required argument stands for another that is given."""
    return name == "inputs_embeds" and "input_ids" in names


def _dummy(model: nn.Module, about: About, parameters: Mapping[str, inspect.Parameter]) -> Iterator[Choice]:
    """The batch that the model names itself, ids brought into the vocabulary; ids alone say too little."""
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception:  # a property of the user's class
        return
    if not isinstance(dummy, Mapping) or set(dummy) <= {"input_ids"} or not set(dummy) <= set(parameters):
        return
    yield {
        name: [about.ids(*value.shape) if name.endswith("input_ids") else value.to(about.device)]
        for name, value in dummy.items()
        if isinstance(value, Tensor)
    }


def _variants(name: str, names: Sequence[str], about: About) -> Iterator[Any]:
    """The values to try for an argument, beside the other arguments that are given."""
    for pattern, make in ARGUMENTS:
        if re.fullmatch(pattern, name):
            yield from make(about, names)
            return
    yield from about.by_layer(names)
