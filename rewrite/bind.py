"""Syntax tree -> method instances: names, argument types and limits are checked here, each with its caret.

Aliases become the sites that they stand for: what is bound holds none.

A method is any frozen dataclass; its fields are the arguments, read through their annotations and the
metadata that `rewrite.method.arg` leaves (limits, choices, help).  It may say more: `positional_sites` (sites
stand in the parentheses), `default_sites` (used when none are written), `check()` (rules across arguments).
Whether a site exists in a model is not asked here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from rewrite.aliases import Aliases
from rewrite.errors import SpecError, nearest
from rewrite.lexer import brief
from rewrite.parser import TWICE, parse_sites
from rewrite.spec import (
    Bool,
    Call,
    Clause,
    Float,
    Int,
    Keyword,
    Name,
    Null,
    Selector,
    Span,
    Spec,
    Str,
    Tuple,
    Value,
    known_role,
)

_LISTED = 12  # a hint names at most this many known names
_NO: Any = object()  # "this node is no such value"
_TYPES = {int: "an int", float: "a float", bool: "true or false", str: "a string", type(None): "none"}


@dataclass(frozen=True)
class Argument:
    """One argument of a method, as the spec language and the documentation see it."""

    name: str
    annotation: Any
    default: Any
    limits: Mapping[str, float | None]
    choices: Mapping[str, type] | tuple[str, ...] | None
    help: str
    positional: bool = False  # written without its name: save(fp8)

    @property
    def required(self) -> bool:
        """Whether the argument has no default."""
        return self.default is dataclasses.MISSING

    @property
    def wants(self) -> str:
        """The accepted values in words: `an int`, `a float or none`, `one of kaiming, pissa`."""
        words = [f"one of {listed(self.choices)}"] if self.choices else []
        # With choices, the strings and classes of the annotation are those choices.
        options = [o for o in _options(self.annotation) if not self.choices or (o in _TYPES and o is not str)]
        return " or ".join(dict.fromkeys(words + [_words(option) for option in options]))


@dataclass(frozen=True)
class Bound:
    """A method with its arguments, and the clause it came from, whose sites are filled in, without aliases."""

    method: Any
    clause: Clause

    @property
    def sites(self) -> Selector:
        """Where the method goes."""
        assert self.clause.sites is not None
        return self.clause.sites


def arguments(cls: type) -> tuple[Argument, ...]:
    """The arguments that the fields of a dataclass describe, in their order.

    >>> @dataclass(frozen=True)
    ... class Scale:
    ...     by: float = 1.0
    >>> [(argument.name, argument.wants, argument.default) for argument in arguments(Scale)]
    [('by', 'a float', 1.0)]
    """
    hints = typing.get_type_hints(cls)
    return tuple(
        Argument(
            name=field.name,
            annotation=hints[field.name],
            default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
            limits=field.metadata.get("limits", {}),
            choices=field.metadata.get("choices"),
            help=field.metadata.get("help", ""),
            positional=field.metadata.get("positional", False),
        )
        for field in dataclasses.fields(cls)
        if field.init
    )


def bind(spec: Spec, methods: Mapping[str, type]) -> tuple[Bound, ...]:
    """One method instance per clause; `methods` maps spec names to frozen dataclasses.

    Raises `SpecError`, pointing at the name, the argument, the call or the alias that is wrong.

    >>> from rewrite.parser import parse
    >>> @dataclass(frozen=True)
    ... class Lora:
    ...     r: int = 8
    >>> bind(parse("lora(r=4)@attn.q,v"), {"lora": Lora})[0].method
    Lora(r=4)
    >>> print(bind(parse("let low = attn,ffn; lora@low[0:8]"), {"lora": Lora})[0].sites)
    attn[0:8],ffn[0:8]
    """
    binder = _Binder(spec, methods)
    return tuple(binder.clause(clause) for clause in spec.clauses)


def canonical(spec: Spec, methods: Mapping[str, type]) -> str:
    """The spelling that saved files use: arguments in field order, sites where the method has them.

    Only what the user wrote is written; it parses and binds to equal methods.  Raises what `bind` raises.

    >>> from rewrite.parser import parse
    >>> @dataclass(frozen=True)
    ... class Lora:
    ...     r: int = 8
    ...     alpha: float = 8.0
    >>> canonical(parse("lora(attn.q, alpha=16, r=4)"), {"lora": Lora})
    'lora(r=4, alpha=16)@attn.q'
    """
    bind(spec, methods)
    return str(replace(spec, clauses=tuple(_ordered(clause, methods[clause.call.name]) for clause in spec.clauses)))


def valued(spec: Spec, methods: Mapping[str, type]) -> Spec:
    """A spec whose words in parentheses are values where a method takes one there: `save(fp8)` names no site."""
    return replace(spec, clauses=tuple(_valued(clause, methods[clause.call.name]) for clause in spec.clauses))


def _ordered(clause: Clause, cls: type) -> Clause:
    clause = _valued(clause, cls)
    positional = clause.sites is not None and _positional(cls)
    return replace(clause, call=_ordered_call(clause.call, cls), positional=positional)


def _ordered_call(call: Call, cls: type) -> Call:
    written = {keyword.name: keyword for keyword in call.kwargs}
    args, kwargs = list(call.args), list[Keyword]()
    for argument in arguments(cls):
        if argument.name not in written:
            continue
        if argument.positional:
            args.append(written[argument.name].value)
            continue
        keyword = written[argument.name]
        if isinstance(keyword.value, Call) and isinstance(argument.choices, Mapping):
            chosen = argument.choices[keyword.value.name]
            keyword = replace(keyword, value=_ordered_call(keyword.value, chosen))
        kwargs.append(keyword)
    return replace(call, args=tuple(args), kwargs=tuple(kwargs))


def _valued(clause: Clause, cls: type) -> Clause:
    """The clause of a method with a positional argument: words in its parentheses are values, not sites."""
    if not clause.positional or clause.sites is None or not any(a.positional for a in arguments(cls)):
        return clause
    words = tuple(Name(str(term), term.span) for term in clause.sites.terms)
    return replace(clause, call=replace(clause.call, args=clause.call.args + words), sites=None, positional=False)


def _positional(cls: type) -> bool:
    return bool(getattr(cls, "positional_sites", False))


def _whole(cls: type) -> bool:
    """Whether a method is about the whole model: there is no kind of site that it takes."""
    return not getattr(cls, "kinds", True)


class _Binder:
    """Binds the clauses of one source text."""

    def __init__(self, spec: Spec, methods: Mapping[str, type]) -> None:
        self.source, self.methods, self.aliases = spec.source, methods, Aliases(spec)

    def error(self, span: Span, message: str, hint: str = "") -> SpecError:
        return SpecError(message, self.source, *span, hint)

    def clause(self, clause: Clause) -> Bound:
        call = clause.call
        if call.name not in self.methods:
            close = nearest(call.name, self.methods, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {listed(self.methods) or 'none'}"
            raise self.error(call.name_span, f"unknown method '{brief(call.name)}'", hint)
        cls = self.methods[call.name]
        clause = _valued(clause, cls)
        self.twice(clause, cls)
        method = self.instance(cls, clause.call)
        self.marked(clause, method)
        if _whole(cls):
            self.no_sites(clause)
        if (_whole(cls) or getattr(cls, "policy", False)) and clause.label is not None:
            message = f"{call.name} is no adapter: it cannot be called '{brief(clause.label)}'"
            raise self.error(clause.span, message, f"write {replace(clause, label=None)}")
        if _whole(cls) or (clause.sites is None and getattr(cls, "anywhere", False)):
            return Bound(method, clause)
        if clause.sites is None:
            return Bound(method, self.placed(clause, cls))
        return Bound(method, replace(clause, sites=self.aliases.expand(clause.sites)))

    def placed(self, clause: Clause, cls: type) -> Clause:
        """The clause with the method's default sites, whose errors point at the method's name."""
        name, default = clause.call.name_span, getattr(cls, "default_sites", None)
        if default is None:
            example = parse_sites("base" if _positional(cls) else "attn.q,v")
            fixed = str(_ordered(replace(clause, sites=example, label=None, approximate=False), cls))
            message = f"{clause.call.name} does not say where it goes"
            raise self.error(name, message, f"write {brief(fixed, 80)}")
        return replace(clause, sites=parse_sites(default).moved(name))

    def twice(self, clause: Clause, cls: type) -> None:
        """A word in the parentheses and sites after '@': only methods with a positional argument take a word there."""
        words = [value for value in clause.call.args if isinstance(value, Name)]
        if clause.sites is None or not words or any(a.positional for a in arguments(cls)):
            return
        at = self.source.index("@", clause.call.span.stop)
        word = words[0].value
        raise self.error(
            Span(at, at + 1), TWICE, "" if known_role(word) else f"an argument is written {brief(word)}=..."
        )

    def marked(self, clause: Clause, method: Any) -> None:
        """A clause is marked by '~' where its method is approximate, and only there."""
        if not hasattr(method, "approximation"):
            return
        why = method.approximation(clause.approximate)
        other = f"write {brief(str(replace(clause, approximate=not clause.approximate)), 80)}"
        if why is not None and not clause.approximate:
            raise self.error(clause.call.span, f"{brief(str(clause.call))} is approximate: {why}", other)
        if why is None and clause.approximate:
            written = brief(str(clause.call)).removesuffix("()")
            raise self.error(clause.call.span, f"{written} needs no '~': nothing about it is approximate", other)

    def no_sites(self, clause: Clause) -> None:
        """A clause about the whole model has no sites."""
        name = clause.call.name
        plain = str(replace(clause, sites=None, label=None))
        if clause.sites is not None:
            raise self.error(clause.sites.span, f"{name} is about the whole model, not about sites", f"write {plain}")

    def instance(self, cls: type, call: Call) -> Any:
        """The dataclass with the call's arguments."""
        known = {argument.name: argument for argument in arguments(cls)}
        call = self.named(call, list(known.values()))
        values: dict[str, Any] = {}
        for keyword in call.kwargs:
            if keyword.name not in known:
                raise self.unknown(call.name, keyword, list(known.values()))
            values[keyword.name] = self.argument(call.name, known[keyword.name], keyword.value)
        for argument in known.values():
            if argument.required and argument.name not in values:
                message = f"{call.name} needs the argument '{argument.name}'"
                raise self.error(call.name_span, message, f"it wants {argument.wants}")
        try:
            made = cls(**values)
            complaint = made.check() if hasattr(made, "check") else None
        except ValueError as error:
            raise self.error(call.span, f"{call.name}: {error}") from error
        if complaint:
            raise self.error(call.span, f"{call.name}: {complaint}")
        return made

    def named(self, call: Call, known: Sequence[Argument]) -> Call:
        """The call with the value of its positional argument under its name."""
        first = next((argument for argument in known if argument.positional), None)
        if first is not None and len(call.args) == 1:
            value = call.args[0]
            if any(keyword.name == first.name for keyword in call.kwargs):
                raise self.error(value.span, f"argument '{first.name}' is written twice")
            return replace(call, args=(), kwargs=(Keyword(first.name, value, value.span), *call.kwargs))
        if first is not None and len(call.args) > 1:
            raise self.error(call.args[1].span, f"{call.name} takes one value, sites stand after '@'")
        self.no_positional(call, known)
        return call

    def no_positional(self, call: Call, known: Sequence[Argument]) -> None:
        if not call.args:
            return
        value, taken = call.args[0], {keyword.name for keyword in call.kwargs}
        free = [argument for argument in known if argument.name not in taken]
        fits = next((argument for argument in free if self.fits(argument, value)), None)
        if fits is None:
            raise self.error(value.span, f"{call.name} takes keyword arguments", takes(known))
        written = f"{call.name}({fits.name}={brief(str(value))})"
        raise self.error(value.span, f"{call.name} takes keyword arguments: write {written}")

    def fits(self, argument: Argument, value: Value) -> bool:
        """Whether a value that was written without a name could be this argument."""
        try:
            self.argument("", argument, value)
        except SpecError:
            return False
        return True

    def unknown(self, name: str, keyword: Keyword, known: Sequence[Argument]) -> SpecError:
        message = f"{name} has no argument '{brief(keyword.name)}'"
        word = keyword.name.lower()
        close = nearest(word, [argument.name for argument in known], 1)
        # A paper's word for an argument stands in its help ("rank" for r).
        close += [a.name for a in known if word in a.help.lower().split()]
        close += [a.name for a in known if a.name.startswith(word) or word.startswith(a.name)]
        hint = f"did you mean '{close[0]}'? " if close else ""
        return self.error(keyword.span, message, hint + takes(known))

    def argument(self, name: str, argument: Argument, value: Value) -> Any:
        """The Python value of one argument, checked against its type, choices and limits."""
        place = f"{name}({argument.name})"
        if chosen := _chosen(argument, value):
            call = value if isinstance(value, Call) else Call(_word(value), span=value.span)
            return self.instance(chosen, call)
        found = _plain(argument, value)
        if found is _NO:
            raise self.misfit(place, argument, value)
        numbers: Iterable[Any] = cast("tuple[Any, ...]", found) if isinstance(found, tuple) else (found,)
        for number in numbers:
            self.limited(place, argument, number, value)
        return cast("Any", found)

    def misfit(self, place: str, argument: Argument, value: Value) -> SpecError:
        got = brief(str(value)) if isinstance(value, Str) else f"'{brief(str(value))}'"
        word, choices = _word(value), argument.choices or _literals(argument.annotation)
        if word in choices:
            return self.error(value.span, f"{place[:-1]}={word}) takes no arguments", f"write {word}")
        close = nearest(word, choices, 1) if word else []
        hint = f"did you mean '{close[0]}'?" if close else ""
        return self.error(value.span, f"{place} wants {argument.wants}, got {got}", hint)

    def limited(self, place: str, argument: Argument, number: Any, value: Value) -> None:
        if isinstance(number, bool) or not isinstance(number, int | float):
            return
        limits = argument.limits
        low, high, above, below = (limits.get(key) for key in ("low", "high", "above", "below"))
        rules = (
            (low is not None and number < low, f"at least {low}"),
            (above is not None and number <= above, f"above {above}"),
            (high is not None and number > high, f"at most {high}"),
            (below is not None and number >= below, f"below {below}"),
        )
        for broken, rule in rules:
            if broken:
                got = number if isinstance(value, Tuple) else value
                raise self.error(value.span, f"{place} must be {rule}, got {got}")


def _word(value: Value) -> str:
    """The name in a value that may be a choice: `pissa`, `"pissa"`, `pissa(niter=4)`."""
    return value.name if isinstance(value, Call) else value.value if isinstance(value, Name | Str) else ""


def _chosen(argument: Argument, value: Value) -> type | None:
    """The class that a value picks where the choices have arguments of their own."""
    return argument.choices.get(_word(value)) if isinstance(argument.choices, Mapping) else None


def _plain(argument: Argument, value: Value) -> Any:
    """The value by choices and annotation, without limits; `_NO` if it does not fit."""
    if argument.choices and isinstance(value, Name | Str):
        named = not isinstance(argument.choices, Mapping) and value.value in argument.choices
        return value.value if named else _NO
    return _fit(value, _options(argument.annotation))


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _literals(annotation: Any) -> list[str]:
    """The words among the literal values that an annotation allows."""
    literal = [option for option in _options(annotation) if typing.get_origin(option) is typing.Literal]
    return [word for option in literal for word in typing.get_args(option) if isinstance(word, str)]


def _fit(value: Value, options: tuple[Any, ...]) -> Any:
    """`value` as the first option it fits; an int is a float only where no option is an int."""
    for option in sorted(options, key=lambda option: option is float):
        if (found := _fit_one(value, option)) is not _NO:
            return found
    return _NO


def _fit_one(value: Value, option: Any) -> Any:
    if typing.get_origin(option) is typing.Literal:
        plain = None if isinstance(value, Null) else getattr(value, "value", _NO)
        same = [o for o in typing.get_args(option) if type(o) is type(plain) and o == plain]
        return same[0] if same else _NO
    if isinstance(value, Tuple):
        return _fit_tuple(value, option)
    if option is type(None):
        return None if isinstance(value, Null) else _NO
    if option is float and isinstance(value, Int | Float):
        return float(value.value)
    if (option is int and isinstance(value, Int)) or (option is bool and isinstance(value, Bool)):
        return value.value
    return value.value if option is str and isinstance(value, Str | Name) else _NO


def _fit_tuple(value: Tuple, option: Any) -> Any:
    kinds = typing.get_args(option)
    if typing.get_origin(option) is not tuple:
        return _NO
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value.items)
    if len(kinds) != len(value.items):
        return _NO
    items = tuple(_fit(item, _options(kind)) for item, kind in zip(value.items, kinds, strict=True))
    return _NO if any(item is _NO for item in items) else items


def _words(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(option)))}"
    if typing.get_origin(option) is tuple:
        kinds = typing.get_args(option)
        if kinds[-1] is Ellipsis:
            return f"a tuple, each item {_words(kinds[0])}"
        return f"a tuple ({', '.join(map(_words, kinds))})"
    if option in _TYPES:
        return _TYPES[option]
    options = _options(option)
    return " or ".join(map(_words, options)) if len(options) > 1 else getattr(option, "__name__", str(option))


def listed(names: Iterable[str]) -> str:
    """The first names, and dots if there are more."""
    names = list(names)
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def takes(known: Sequence[Argument]) -> str:
    """What to say about the arguments of a method in a hint."""
    return f"it takes: {listed(argument.name for argument in known)}" if known else "it takes none"
