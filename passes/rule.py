"""Rules: a pattern on the left, ordinary PyTorch on the right, checked when they are defined.

    @rule(add(linear("x", "w", "b"), linear("h", "B")))
    def fuse(r, x, w, b, h, B):
        '''linear(x, w, b) + linear(h, B)  ->  adapted_linear(x, w, b, h, B)'''
        return torch.ops.rewrite.adapted_linear(...)

The right side receives captures as proxies (`r` is the `Builder`) and returns the replacement, or None to
leave the match alone; where the match is a list, a list whose items take over from its items.  One walk in program
order applies a rule, and nodes that it made are not revisited; rules that share a walk feed one another.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from rewrite.passes.builder import Builder, unwrap
from rewrite.passes.pattern import Captures, Pattern
from rewrite.passes.record import Edit, GraphRecord, PassRecord


@dataclass(frozen=True)
class Rule:
    """A named rewrite; `group` names the capture by which all matches are rewritten together."""

    name: str
    pattern: Pattern
    body: Callable[..., Any]
    equation: str
    source: str
    group: str | None = None


def rule(pattern: Pattern, *, group: str | None = None, name: str | None = None) -> Callable[..., Rule]:
    """Define a rule; its parameters must be the pattern's captures, its docstring `before -> after`."""

    def define(body: Callable[..., Any]) -> Rule:
        label = name or body.__name__.strip("_")
        takes = set(list(inspect.signature(body).parameters)[1:])
        if takes != pattern.names():
            raise TypeError(f"rule {label} takes {sorted(takes)}, its pattern captures {sorted(pattern.names())}")
        equation = " ".join((body.__doc__ or "").split("\n\n")[0].split())
        if "->" not in equation:
            raise TypeError(f"rule {label} has no 'before -> after' docstring")
        code = body.__code__
        source = f"{Path(code.co_filename).parent.name}/{Path(code.co_filename).name}:{code.co_firstlineno}"
        return Rule(label, pattern, body, equation, source, group)

    return define


@dataclass
class _Match:
    root: fx.Node
    captures: Captures
    nodes: list[fx.Node]


def apply_rules(graph: fx.Graph, rules: Sequence[Rule], record: PassRecord, log: GraphRecord) -> None:
    """Apply several rules in one walk, the first that matches at each node; what they make is visited in its turn."""
    builders = {rule.name: Builder(graph, rule.name, log) for rule in rules}

    def visit(root: fx.Node) -> None:
        for rule in () if root._erased else rules:
            match, builder = _find(rule, root), builders[rule.name]
            if match is not None and _rewrite(rule, builder, [match], record):
                for node in tuple(builder.made):
                    visit(node)
                return

    for root in list(graph.nodes):
        visit(root)


def apply_rule(graph: fx.Graph, rule: Rule, record: PassRecord, log: GraphRecord) -> None:
    """Apply one rule everywhere in one walk; every application leaves an `Edit`."""
    builder = Builder(graph, rule.name, log)
    if rule.group:
        groups: dict[Any, list[_Match]] = {}
        for root in graph.nodes:
            if (match := _find(rule, root)) is not None:
                groups.setdefault(match.captures[rule.group], []).append(match)
        for matches in groups.values():
            _rewrite(rule, builder, matches, record)
        return
    for root in list(graph.nodes):
        if root._erased or root.meta.get("rule") == rule.name:
            continue
        if (match := _find(rule, root)) is not None:
            _rewrite(rule, builder, [match], record)


def _find(rule: Rule, root: fx.Node) -> _Match | None:
    nodes: list[fx.Node] = []
    captures = rule.pattern.match(root, {}, nodes, root=True)
    if captures is None:
        return None
    return _Match(root, dict.fromkeys(rule.pattern.names()) | captures, nodes)


def _captures(rule: Rule, builder: Builder, matches: list[_Match]) -> Captures:
    """The captures of one match; of a group, lists of them, moved to where the first match can use them."""
    first = matches[0]
    if not rule.group:
        return first.captures
    lists: Captures = {name: [m.captures[name] for m in matches] for name in first.captures}
    shared = lists.pop(rule.group)[0]
    for values in lists.values():
        for node in values:
            if isinstance(node, fx.Node):
                builder.hoist(node, first.root)
    return {**lists, rule.group: shared}


def _rewrite(rule: Rule, builder: Builder, matches: list[_Match], record: PassRecord) -> bool:
    with builder.at(matches[0].root):
        result = unwrap(rule.body(builder, **builder.proxy(_captures(rule, builder, matches))))
    made = builder.made
    if result is None:
        for node in reversed(made):
            builder.graph.erase_node(node)
        return False
    matched = list(dict.fromkeys(n for m in matches for n in m.nodes))
    roots = [m.root for m in matches]
    before, after = {n: line(n) for n in matched}, tuple(line(n) for n in made)
    for root, new in zip(roots, result if rule.group else [result], strict=True):
        if isinstance(new, (list, tuple)):
            _replace_items(root, new)
        else:
            root.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)
    kept = _sweep(builder.graph, matched)
    removed = tuple(text for node, text in before.items() if node not in kept)
    record.edits.append(Edit(rule.name, site(roots), rule.equation, rule.source, removed, after))
    return True


def items_of(root: fx.Node) -> list[fx.Node] | None:
    """The nodes that read one item each of a list; None where something reads the list as a whole."""
    users = list(root.users)
    return users if all(u.target is operator.getitem and isinstance(u.args[1], int) for u in users) else None


def _replace_items(root: fx.Node, items: Sequence[fx.Node | None]) -> None:
    """Let `items` take over from `root[0]`, `root[1]`, ..."""
    for user in items_of(root) or ():
        new = items[user.args[1]]  # type: ignore[index]  # `items_of` has seen an integer
        if new is not None:
            user.replace_all_uses_with(new)
            user.graph.erase_node(user)


def _sweep(graph: fx.Graph, nodes: list[fx.Node]) -> set[fx.Node]:
    """Erase matched nodes that nobody uses any more; returns those that stay."""
    kept = set(nodes)
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            graph.erase_node(node)
            kept.discard(node)
    return kept


def site(roots: list[fx.Node]) -> str:
    """The module path of an edit: of one node, or of a group as `parent.[a,b]`."""
    paths = list(dict.fromkeys(str(n.meta.get("site", "")) for n in roots))
    if len(paths) == 1:
        return paths[0]
    parents = {p.rpartition(".")[0] for p in paths}
    leaves = ",".join(p.rpartition(".")[2] for p in paths)
    return f"{parents.pop()}.[{leaves}]" if len(parents) == 1 else "; ".join(paths)


_TARGET = re.compile(r"^(torch\.nn\.functional|torch\.ops|torch\._C\._nn|_operator|torch)\.")


def line(node: fx.Node) -> str:
    """A node as one readable line of Python, `name = op(arguments)`, without noise."""
    if node.op == "placeholder":
        return f"{node.name}: input"
    if node.op == "output":
        return f"return {node.args[0]}"
    args = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    if node.op == "call_method":
        return f"{node.name} = {args[0]}.{node.target}({', '.join(args[1:])})"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    return f"{node.name} = {target_name(node.target)}({', '.join(args)})"


def target_name(target: Any) -> str:
    """The short name of an operator: `linear`, `add`, `rewrite.adapted_linear`."""
    if isinstance(target, str):
        return target
    name = str(target) if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    return _TARGET.sub("", name).removesuffix(".default")


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return repr(value)
