"""A PEFT configuration as plain data: from a folder, a mapping or a `PeftConfig`; peft itself is not needed.

Every field is translated, known to change nothing, or refused by name: a field that is skipped in silence is how an
adapter ends up computing something else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewrite.errors import RewriteError

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

ABOUT = frozenset(  # where a file came from: nothing that an adapter computes
    {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type"}
)
_HEADS = {  # what PEFT trains in full besides, by the task
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Config:
    """The fields of a PEFT configuration; `about` says in messages where it came from."""

    fields: Mapping[str, Any]
    about: str = "this PEFT configuration"

    @property
    def type(self) -> str:
        """The PEFT type, e.g. `LORA`."""
        return str(self.fields.get("peft_type") or "")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; `default` where it is missing or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def refuse(self, name: str, why: str) -> RewriteError:
        """The error for a field that cannot be translated."""
        return RewriteError(f"{self.about}: {name}={self.fields.get(name)!r} cannot be translated: {why}")

    def check(self, known: Collection[str], only: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
        """Raise `RewriteError` for the first field that is neither known nor without an effect.

        `only` maps a field to the values under which it changes nothing, and to the reason why others are refused.
        """
        for name, value in self.fields.items():
            if name in ABOUT or name in known:
                continue
            allowed, why = only.get(name, ((), ""))
            if _nothing(value) or any(type(value) is type(a) and value == a for a in allowed):
                continue
            raise self.refuse(name, why or f"rewrite does not know this field of {self.type}; a newer PEFT may have it")

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """The modules that PEFT trains in full: those named, and the head that the task type implies."""
        task = self.get("task_type", "")
        return tuple(dict.fromkeys([*names(self, "modules_to_save"), *_HEADS.get(str(task), ())]))


def _nothing(value: Any) -> bool:
    return value is None or value is False or value in ("none", "") or (isinstance(value, (list, dict)) and not value)


def names(config: Config, field: str) -> tuple[str, ...]:
    """A field that holds a list of names, each once."""
    value = config.get(field, ())
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise config.refuse(field, "a list of names is expected")
    return tuple(dict.fromkeys(value))


def read(source: Any) -> Config:
    """The configuration in a folder (or in its `adapter_config.json`), a mapping, or a `PeftConfig`.

    >>> read({"peft_type": "LORA", "r": 4}).get("r")
    4
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return _config(source, "this PEFT configuration")
    if isinstance(source, (str, os.PathLike)):
        place = Path(source)
        return _from_file(place / CONFIG if place.is_dir() else place)
    to_dict: Any = getattr(source, "to_dict", None)
    if callable(to_dict):
        made: Any = to_dict()
        return _config(made, f"this {type(source).__name__}")
    raise RewriteError(f"a PEFT configuration is a folder, a mapping or a PeftConfig, not {type(source).__name__}")


def _from_file(file: Path) -> Config:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RewriteError(f"{file.parent} holds no PEFT adapter: {file.name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RewriteError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise RewriteError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise RewriteError(f"{file} is damaged: it holds no fields")
    return _config(found, str(file))


def _config(fields: Mapping[str, Any], about: str) -> Config:
    found = Config({str(name): _plain(value) for name, value in fields.items()}, about)
    if not found.type:
        raise RewriteError(f"{about} does not say its peft_type")
    return found


def _plain(value: Any) -> Any:
    """A value as JSON would hold it: PEFT keeps names in sets and types in enumerations."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return getattr(value, "value", value)
