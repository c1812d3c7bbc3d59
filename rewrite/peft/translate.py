"""A PEFT configuration as a spec: with a model, for exactly the modules that PEFT would wrap; without, by patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from rewrite.errors import Error, RewriteError
from rewrite.methods import registry
from rewrite.parser import parse
from rewrite.peft import targets
from rewrite.peft.config import Config, names, read
from rewrite.peft.targets import Target
from rewrite.peft.terms import terms, universe
from rewrite.peft.tuner import Tuner, kind_of, tuner_of, written


def from_config(config: Any, model: nn.Module | None = None) -> str:
    """The spec of a PEFT configuration: a `PeftConfig`, a mapping, or a folder with `adapter_config.json`.

    With `model` it names the modules that PEFT would adapt in it, and no others.  Without one, what takes a model to
    know (`all-linear`, layer numbers, IA3's feed-forward modules) is refused.  Raises `RewriteError` that names the
    field for all that cannot be translated.

    >>> from_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]})
    'lora(r=4, alpha=8.0)@/(?:.*\\\\.)?(?:q_proj|v_proj)/'
    """
    found = read(config)
    tuner = tuner_of(found)
    found.check(tuner.reads | targets.SELECTING, tuner.only)
    return _for_model(found, tuner, model) if model is not None else _without_model(found, tuner)


# --- with a model ---


def _for_model(config: Config, tuner: Tuner, model: nn.Module) -> str:
    if "prompt" in tuner.kinds:  # of the model as a whole
        return written(tuner.call(config, None, "prompt"))
    everything = universe(model)
    adapted = adapted_by(config, tuner, model)
    saved = _saved(config, model, adapted)
    clauses: dict[str, list[str]] = {}
    for target in adapted:
        kind = "parameter" if target.parameter else kind_of(target.module)
        if target.parameter and not _bare(target):
            raise config.refuse(
                "target_parameters", f"{target.path} is a {type(target.module).__name__}: name it whole"
            )
        if not target.parameter and (reason := tuner.refusal(target.module, kind)) is not None:
            raise config.refuse("target_modules", f"{target.path}: {reason}")
        for name, call in tuner.parts(config, target, kind):
            clauses.setdefault(written(call), []).append(name.removesuffix(".weight") if target.parameter else name)
    found = []
    for call, paths in clauses.items():
        named = terms(paths, everything)
        if call.startswith("tokens"):  # PEFT follows into a tied head
            named = terms([p for p in paths if not tied_embedding(model, p)], everything)
            named = [*(["tied"] if len(named) < len(paths) else []), *named]
        found.append(f"{call}@{','.join(named)}")
    if saved:
        found.append(f"full({', '.join(terms([t.path for t in saved], everything))})")
    for ids, rows in rows_of(config, model, adapted).items():
        found.append(f"{written(('tokens', {'ids': ids}))}@{','.join(rows)}")
    if biased := _biased(config, tuner, model, adapted, saved):
        found.append(f"{_bias_method(config)}@{','.join(terms(biased, everything))}")
    return " + ".join(found)


def rows_of(config: Config, model: nn.Module, adapted: Sequence[Target]) -> dict[tuple[int, ...], list[str]]:
    """Where `trainable_token_indices` of LoRA trains rows: {token ids: terms}."""
    value = config.get("trainable_token_indices")
    if value is None:
        return {}
    wanted = value if isinstance(value, dict) else {input_embedding(model): value}
    everything = universe(model)
    found: dict[tuple[int, ...], list[str]] = {}
    for end, ids in wanted.items():
        paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path and path.endswith(end)]
        kinds = {kind_of(model.get_submodule(path)) for path in paths}
        if not paths or kinds != {"embedding"} or len(wanted) > 1 or any(t.path in paths for t in adapted):
            raise config.refuse(
                "trainable_token_indices", "it must name an embedding that nothing else adapts, and one"
            )
        tied = any(tied_embedding(model, path) for path in paths)
        found[tuple(ids)] = ["tied"] if tied else terms(paths, everything)
    return found


def input_embedding(model: nn.Module) -> str:
    """The path of the embedding that reads a model's tokens."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    layer = getter() if callable(getter) else None
    return next((path for path, module in model.named_modules() if module is layer), "embed_tokens")


def tied_embedding(model: nn.Module, path: str) -> bool:
    """Whether an embedding shares its weight with a head, and the configuration says so, which PEFT goes by."""
    weight = getattr(model.get_submodule(path), "weight", None)
    shared = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1
    return shared and bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _bare(target: Target) -> bool:
    """Whether a parameter is one that its module applies itself, as it stands, or the weight of a linear layer."""
    kind = kind_of(target.module)
    return kind == "other" or (isinstance(target.module, nn.Linear) and target.parameter == "weight")


def adapted_by(config: Config, tuner: Tuner, model: nn.Module) -> list[Target]:
    """The modules and parameters that PEFT would wrap; raises `RewriteError` where there are none."""
    default = None
    if config.get("target_modules") is None and tuner.type == "TRAINABLE_TOKENS":
        default = [input_embedding(model)]
    elif config.get("target_modules") is None and not config.get("target_parameters"):
        default = default_targets(config, model)
    modules = targets.modules_of(model, config, default)
    parameters = targets.parameters_of(model, config)
    paths = {t.path for t in modules}
    for parameter in parameters:
        if parameter.path in paths:
            raise config.refuse("target_parameters", f"{parameter.path} is among target_modules too")
    if not modules and not parameters and not config.get("trainable_token_indices"):
        raise RewriteError(f"{config.about}: its target_modules match nothing in this {type(model).__name__}")
    return [*modules, *parameters]


def default_targets(config: Config, model: nn.Module) -> Any:
    """The modules that PEFT adapts in an architecture where a configuration names none; only peft knows them."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError as error:
        raise config.refuse("target_modules", "its default is in peft, which is not installed: name them") from error
    tuner = next((cls for name, cls in PEFT_TYPE_TO_TUNER_MAPPING.items() if name.value == config.type), None)
    known = getattr(tuner, "target_module_mapping", {})
    if kind not in known:
        raise config.refuse("target_modules", f"PEFT has no default for {kind or type(model).__name__}: name them")
    found = known[kind]
    return found if isinstance(found, str) else list(found)


def _saved(config: Config, model: nn.Module, adapted: Sequence[Target]) -> list[Target]:
    """The modules trained in full, which nothing else may touch."""
    saved = targets.saved_in_full(model, config)
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for target in saved:
        for other in adapted:
            if f"{other.path}.".startswith(f"{target.path}.") or f"{target.path}.".startswith(f"{other.path}."):
                raise config.refuse("modules_to_save", f"{target.path} is adapted too, at {other.path}")
        for name, parameter in target.module.named_parameters():
            if outside := [n for n in users[id(parameter)] if not n.startswith(f"{target.path}.")]:
                raise config.refuse(
                    "modules_to_save",
                    f"{target.path}.{name} is shared with {outside[0]}, and PEFT would train a copy for one of the two",
                )
    return [t for t in saved if any(True for _ in t.module.parameters())]


def _biased(
    config: Config, tuner: Tuner, model: nn.Module, adapted: Sequence[Target], saved: Sequence[Target]
) -> list[str]:
    """The modules whose bias is trained."""
    value = config.get("bias", "none")
    if value == "none":
        return []
    if value == tuner.bias_only and value:
        layers = [(t.path, t.module) for t in adapted if not t.parameter]
        inside = [(f"{path}.out_proj", m.out_proj) for path, m in layers if isinstance(m, nn.MultiheadAttention)]
        found = [path for path, module in (*layers, *inside) if getattr(module, "bias", None) is not None]
    elif value == "all":
        found = [path for path, m in model.named_modules() if isinstance(m._parameters.get("bias"), nn.Parameter)]
    else:
        raise config.refuse("bias", f"{tuner.type} has none, all and {tuner.bias_only or 'nothing else'}")
    whole = [f"{t.path}." for t in saved]
    if "" in found:
        raise config.refuse("bias", "the model itself owns a bias")
    return [path for path in found if not any(f"{path}.".startswith(p) for p in whole)]


def _bias_method(config: Config) -> str:
    if "bitfit" not in registry():
        raise config.refuse("bias", "rewrite has no method that trains biases")
    return "bitfit"


# --- without one ---


def _without_model(config: Config, tuner: Tuner) -> str:
    if "prompt" in tuner.kinds:
        return written(tuner.call(config, None, "prompt"))
    for field in ("layers_to_transform", "layers_pattern", "target_parameters", "trainable_token_indices"):
        if config.get(field) not in (None, []):
            raise config.refuse(field, "what it means takes the model: pass it")
    if config.get("bias", "none") != "none":
        raise config.refuse("bias", "which modules have one takes the model: pass it")
    wanted = config.get("target_modules")
    if wanted is None or (isinstance(wanted, str) and wanted.lower() == targets.ALL_LINEAR):
        raise config.refuse("target_modules", "what it means takes the model: pass it")
    base = wanted if isinstance(wanted, str) else f"(?:.*\\.)?(?:{_either(wanted)})"
    without = [f"(?!{pattern})" for pattern in _left_out(config)]
    clauses, earlier = [], list[str]()
    for key in _patterned(config):
        target = Target(key, nn.Identity())
        ahead = [*without, *(f"(?!{e})" for e in earlier), f"(?=(?:.*\\.)?(?:{key})$)"]
        clauses.append(_clause(written(tuner.call(config, target, "linear")), "".join(ahead) + base))
        earlier.append(f"(?:.*\\.)?(?:{key})$")
    ahead = [*without, *(f"(?!{e})" for e in earlier)]
    clauses.append(_clause(written(tuner.call(config, None, "linear")), "".join(ahead) + base))
    if config.saved_modules:
        clauses.append(f"full({_regex(f'.*(?:{_either(config.saved_modules)})')})")
    text = " + ".join(clauses)
    try:
        parse(text)
    except Error as error:
        raise config.refuse("target_modules", f"it cannot be written as a pattern, pass the model: {error}") from error
    return text


def _clause(call: str, pattern: str) -> str:
    return f"{call}@{_regex(pattern)}"


def _left_out(config: Config) -> Iterable[str]:
    """Patterns that no target matches, to be looked for ahead."""
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        yield f"(?:{excluded})$"
    elif excluded:
        yield f"(?:.*\\.)?(?:{_either(names(config, 'exclude_modules'))})$"
    if config.saved_modules:
        yield f"(?:.*\\.)?(?:{'|'.join(config.saved_modules)})(?:\\.|$)"


def _patterned(config: Config) -> list[str]:
    """The keys of rank_pattern and alpha_pattern: one key is about a module, or two that are the same."""
    ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    if ranks and alphas and list(ranks) != list(alphas):
        raise config.refuse("alpha_pattern", "how it meets rank_pattern takes the model: pass it")
    return list(ranks or alphas)


def _either(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in words)


def _regex(pattern: str) -> str:
    return "/" + pattern.replace("/", "\\/") + "/"
