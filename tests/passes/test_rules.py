"""The rule engine: patterns, checks at definition, one walk, grouped rules, and the records of edits."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewrite.passes.operators import add, linear, mul, pad
from rewrite.passes.pattern import any_of
from rewrite.passes.record import Edit, PassRecord, group, summarise
from rewrite.passes.rule import apply_rule, rule
from tests.passes.graphs import capture, inputs, record


@rule(mul(mul("x", "a"), "b"))
def fold(r: Any, x: Any, a: Any, b: Any) -> Any:
    """x * a * b  ->  x * (a * b)"""
    return None if not all(isinstance(v, float) for v in (a, b)) else x * (a * b)


def targets(gm) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_a_rule_rewrites_and_records():
    gm = capture(lambda x: x * 2.0 * 3.0 + 1, torch.randn(3))
    done = PassRecord("fold")
    apply_rule(gm.graph, fold, done, record())
    gm.recompile()
    x = torch.randn(3)
    torch.testing.assert_close(gm(x)[0], x * 6.0 + 1)
    assert targets(gm).count(operator.mul) == 1
    (edit,) = done.edits
    assert edit.equation == "x * a * b -> x * (a * b)"
    assert edit.source.startswith("passes/test_rules.py:")
    assert len(edit.removed) == 2
    assert len(edit.added) == 1
    assert "6.0" in edit.added[0]


def test_nodes_a_rule_made_are_not_revisited():
    gm = capture(lambda x: x * 2.0 * 3.0 * 4.0, torch.randn(3))
    done = PassRecord("fold")
    apply_rule(gm.graph, fold, done, record())
    gm.recompile()
    x = torch.randn(3)
    torch.testing.assert_close(gm(x)[0], x * 24.0)


def test_an_inner_value_with_two_users_does_not_match():
    def twice(x):
        y = x * 2.0
        return y * 3.0 + y

    gm = capture(twice, torch.randn(3))
    done = PassRecord("fold")
    apply_rule(gm.graph, fold, done, record())
    assert not done.edits


def test_none_leaves_the_graph_as_it_was():
    gm = capture(lambda x, y: x * y * 2.0, torch.randn(3), torch.randn(3))
    before = str(gm.graph)
    done = PassRecord("fold")
    apply_rule(gm.graph, fold, done, record())
    assert str(gm.graph) == before


def test_every_spelling_is_one_operator():
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    for call in (
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(x, weight=w, bias=b),
        lambda x, w, b: torch.ops.aten.linear.default(x, w, b),
    ):
        gm = capture(call, x, w, b)
        found = [linear.arguments(n) for n in gm.graph.nodes]
        assert [a for a in found if a is not None and all(isinstance(v, torch.fx.Node) for v in a)]


def test_a_missing_trailing_argument_is_none():
    gm = capture(lambda x, w: F.linear(x, w), torch.randn(2, 3), torch.randn(4, 3))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    captures = linear("x", "w", "b").match(node, {}, [], root=True)
    assert captures is not None
    assert captures["b"] is None


def test_a_pattern_without_an_argument_refuses_one_that_is_there():
    gm = capture(lambda x, w, b: F.linear(x, w, b), torch.randn(2, 3), torch.randn(4, 3), torch.randn(4))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert linear("x", "w").match(node, {}, [], root=True) is None


def test_the_same_name_is_the_same_node():
    gm = capture(lambda x, y: (x + x) * (x + y), torch.randn(3), torch.randn(3))
    found = [add("a", "a").match(n, {}, [], root=True) for n in gm.graph.nodes]
    assert sum(f is not None for f in found) == 1


def test_patterns_print():
    assert repr(add(any_of(linear("x", "w"), "y"), pad("z", "p"))) == "add(any_of(linear(x, w), y), pad(z, p))"


def test_rules_are_checked_when_they_are_defined():
    with pytest.raises(TypeError, match=r"rule wrong takes \['y'\], its pattern captures \['x'\]"):

        @rule(mul("x", 2.0))
        def wrong(r, y):
            """x * 2 -> y"""

    with pytest.raises(TypeError, match="rule silent has no 'before -> after' docstring"):

        @rule(mul("x", 2.0))
        def silent(r, x):
            """doubles"""


def test_a_grouped_rule_sees_all_matches_at_once():
    @rule(linear("x", "A"), group="x")
    def together(r: Any, x: Any, A: Any) -> Any:
        """linear(x, A1), linear(x, A2), ...  ->  split(linear(x, cat(A)))"""
        if len(A) < 2:
            return None
        parts = F.linear(x, torch.cat(list(A))).split([a.shape[0] for a in A], dim=-1)
        return [parts[i] for i in range(len(A))]

    def siblings(x, a, b, c):
        first = F.linear(x, a)
        return first, F.linear(x, b.exp()), F.linear(first, c)

    args = torch.randn(5, 3), torch.randn(2, 3), torch.randn(4, 3), torch.randn(6, 2)
    gm = capture(siblings, *args)
    done = PassRecord("together")
    apply_rule(gm.graph, together, done, record())
    gm.graph.lint()
    gm.recompile()
    for ours, theirs in zip(gm(*inputs(gm)), siblings(*args), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(done.edits) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(["mul", "add", "relu", "keep"]), st.floats(-2, 2)), max_size=8))
def test_random_graphs_keep_their_function(steps):
    def chain(x):
        kept = x
        for name, value in steps:
            if name == "mul":
                x = x * value
            elif name == "add":
                x = x + kept
            elif name == "relu":
                x = torch.relu(x)
            else:
                kept = x
        return x + kept

    x = torch.randn(3, dtype=torch.float64)
    gm = capture(chain, x)
    apply_rule(gm.graph, fold, PassRecord("fold"), record())
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(x)[0], chain(x), rtol=1e-12, atol=1e-12)


def edit(site: str, name: str = "insert") -> Edit:
    return Edit(name, site, "a -> b", "f.py:1", ("x = a",), ("x = b",))


def test_edits_group_over_layers():
    sites = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(32) for p in "qv"]
    (found,) = group([edit(s) for s in sites])
    assert found.heading == "insert x64 at model.layers.[0-31].self_attn.[q_proj,v_proj]"


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        (["a"], "a"),
        (["a.0.b"], "a.0.b"),
        (["a.0.b", "a.1.b", "a.3.b"], "a.[0-1,3].b"),
        (["a.0.b", "a.1.c"], "a.0.b, a.1.c"),
        (["h.0.x.1", "h.1.x.1"], "h.[0-1].x.1"),
        ([], ""),
    ],
)
def test_sites_summarise(sites, text):
    assert summarise(sites) == text
