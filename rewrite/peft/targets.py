"""Which modules and parameters of a model a PEFT configuration means, by PEFT's own rules of matching names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewrite.errors import RewriteError
from rewrite.layers import is_conv1d
from rewrite.peft.config import Config, names

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")  # the head of a classifier without output embeddings, by its name

SELECTING = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})
"""The fields that say where an adapter goes; `target_parameters` is of LoRA alone."""


@dataclass(frozen=True)
class Target:
    """A module that PEFT wraps, or one of its parameters."""

    path: str
    module: nn.Module
    parameter: str = ""

    @property
    def name(self) -> str:
        """The path of the module, or of the parameter."""
        return f"{self.path}.{self.parameter}" if self.parameter else self.path


def suffixed(name: str, ends: Iterable[str]) -> bool:
    """Whether a path is one of these names or ends in one, at a dot."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def modules_of(model: nn.Module, config: Config, default: Any = None) -> list[Target]:
    """The modules that an adapter of this configuration wraps, in the model's order; `default` names targets."""
    wanted = config.get("target_modules", default)
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        wanted = all_linear(model, config)
    if wanted is None:
        return []
    if not isinstance(wanted, str) and not all(isinstance(name, str) for name in wanted):
        raise config.refuse("target_modules", "a list of names or one regular expression is expected")
    if isinstance(wanted, str) and config.get("layers_to_transform") is not None:
        raise config.refuse("layers_to_transform", "PEFT takes it with a list of target_modules only")
    rule = _Rule(config, wanted)
    found = [Target(path, module) for path, module in model.named_modules() if path and rule.takes(path)]
    check_shared(model, found)
    return found


class _Rule:
    """PEFT's answer to whether a module is meant."""

    def __init__(self, config: Config, wanted: str | Collection[str]) -> None:
        self.config, self.wanted = config, wanted
        self.excluded = config.get("exclude_modules")
        self.saved = config.saved_modules
        layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
        self.layers = [layers] if isinstance(layers, int) else layers or None
        self.patterns = [pattern] if isinstance(pattern, str) and pattern else pattern or None

    def takes(self, path: str) -> bool:
        if self.excluded and self.leaves_out(path):
            return False
        if any(matched(rf"(^|.*\.){name}($|\..*)", path, self.config, "modules_to_save") for name in self.saved):
            return False
        if isinstance(self.wanted, str):
            return full_match(self.wanted, path, self.config, "target_modules")
        if path in self.wanted:  # named in full: PEFT does not look at the layer then
            return True
        return suffixed(path, self.wanted) and (self.layers is None or self.layer(path) in self.layers)

    def leaves_out(self, path: str) -> bool:
        if isinstance(self.excluded, str):
            return full_match(self.excluded, path, self.config, "exclude_modules")
        return suffixed(path, self.excluded or ())

    def layer(self, path: str) -> int | None:
        """The layer number in a path: the first number behind a name, or behind one of the patterns."""
        if self.patterns is None:
            found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
            return int(found["index"]) if found else None
        for pattern in self.patterns:
            found = matched(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path, self.config, "layers_pattern")
            if found:
                return int(found["index"])
        return None


def matched(pattern: str, name: str, config: Config, field: str) -> re.Match[str] | None:
    """`re.match`; raises `RewriteError` that names the field for what is no regular expression."""
    try:
        return re.match(pattern, name)
    except re.error as error:
        raise config.refuse(field, f"it is no regular expression: {error}") from error


def full_match(pattern: str, name: str, config: Config, field: str) -> bool:
    """`re.fullmatch`; raises `RewriteError` that names the field for what is no regular expression."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise config.refuse(field, f"it is no regular expression: {error}") from error


def all_linear(model: nn.Module, config: Config) -> list[str]:
    """What `all-linear` stands for: every linear layer but the output embedding, or the head of a classifier."""
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(type(m))}
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter) and any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        output = getter()
        left_out = {path for path, module in linear.items() if module is output}
        if output is None and config.get("task_type") == "SEQ_CLS":
            head = next((getattr(model, name) for name in _HEADS if getattr(model, name, None) is not None), None)
            left_out = {path for path, module in linear.items() if module is head}
        linear = {path: module for path, module in linear.items() if path not in left_out}
    return list(linear)


def parameters_of(model: nn.Module, config: Config) -> list[Target]:
    """The parameters that `target_parameters` names, in the order in which PEFT wraps them."""
    wanted = names(config, "target_parameters")
    found = [
        Target(path, module, name)
        for path, module in model.named_modules()
        for name, _ in (module.named_parameters(recurse=False) if wanted else ())
        if suffixed(f"{path}.{name}", wanted)
    ]
    for target in found:
        if not target.path:
            raise config.refuse(
                "target_parameters", f"PEFT cannot wrap {target.parameter}, which the model itself owns"
            )
    check_shared(model, found)
    return found


def saved_in_full(model: nn.Module, config: Config) -> list[Target]:
    """The modules of `modules_to_save`, which PEFT copies and trains; it compares ends of names, dot or not."""
    ends = config.saved_modules
    every = dict(model.named_modules(remove_duplicate=False))
    found = [Target(path, module) for path, module in every.items() if path and path.endswith(ends)] if ends else []
    paths = {t.path for t in found}
    for target in found:
        outer = next((p for p in paths if target.path.startswith(f"{p}.")), None)
        if outer is not None:
            raise config.refuse("modules_to_save", f"it names {target.path} and {outer}, which holds it")
        if buffers := [name for name, _ in target.module.named_buffers()]:
            raise config.refuse(
                "modules_to_save", f"{target.path} has buffers ({', '.join(buffers)}), which PEFT trains a copy of"
            )
    check_shared(model, found)
    return found


def check_shared(model: nn.Module, found: Iterable[Target]) -> None:
    """Raise `RewriteError` where a target stands at several places: PEFT wraps it under its first name alone."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    for target in found:
        if len(paths := places[id(target.module)]) > 1:
            raise RewriteError(
                f"{' and '.join(paths)} are one module: PEFT would adapt it at {paths[0]} alone, which no spec can say"
            )


def pattern_key(patterns: Mapping[str, Any], path: str, config: Config, field: str, dotted: bool = False) -> str | None:
    """The first key of `rank_pattern` or `alpha_pattern` that is about a path; `dotted` ones follow a dot."""
    start = r".*\.{key}$" if dotted else r"(.*\.)?({key})$"
    found = (key for key in patterns if matched(start.replace("{key}", key), path, config, field))
    return next(found, path if path in patterns else None)


def by_path(config: Config, field: str, path: str, default: Any, dotted: bool = False) -> Any:
    """`default`, or what a pattern field says for this path."""
    patterns = config.get(field, {})
    key = pattern_key(patterns, path, config, field, dotted)
    return default if key is None else patterns[key]
