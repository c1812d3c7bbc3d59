"""below_autograd: compiled graphs call our operators without the derivative that Python would wrap them in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import rewrite
from rewrite.codegen import below
from rewrite.passes.below_autograd import BelowAutograd
from tests.models import assert_same, batch, build, disturb, step

OP = torch.ops.rewrite.adapted_linear_core.default


def test_overloads_are_the_operators_without_a_derivative():
    for op, other in below.BELOW.items():
        assert str(other._schema) == str(op._schema).replace("(", ".below(", 1)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Autograd")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(other.name(), "Autograd")
        for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
            here, there = (torch._C._dispatch_has_kernel_for_dispatch_key(o.name(), key) for o in (op, other))
            assert here == there


def test_inductors_graphs_call_them():
    model = disturb(rewrite.compile(build("small"), "lora(r=2, dropout=0.1)@linear", dynamic=False))
    _, sources = run_and_get_code(lambda: step(model, model, batch("small")))
    text = "\n".join(sources)
    assert "adapted_linear_core.default(" not in text
    assert "rewrite_functions['adapted_linear_core into'](" in text  # on a CPU, not even by name: `codegen/direct.py`


class Noted:
    """A pass of the user's own."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs.append(graph)


@pytest.mark.filterwarnings("ignore")
def test_a_pass_of_the_users_own_runs_too():
    noted = Noted()
    torch.manual_seed(0)
    plain = disturb(rewrite.compile(build("small"), "lora(r=2)@linear", backend="eager"))
    torch.manual_seed(0)
    with torch._inductor.config.patch(post_grad_custom_pre_pass=noted, force_disable_caches=True):
        model = disturb(rewrite.compile(build("small"), "lora(r=2)@linear", dynamic=False))
        found = step(model, model, batch("small"))[1]
    assert len(noted.graphs) == 2
    assert any(n.target is below.BELOW[OP] for g in noted.graphs for n in g.nodes)
    assert_same(found, step(plain, plain, batch("small"))[1])


def test_caches_are_keyed_by_both_passes():
    assert BelowAutograd().uuid() == BelowAutograd().uuid()
    assert BelowAutograd(Noted()).uuid() is None
    assert BelowAutograd(BelowAutograd()).uuid() not in (None, BelowAutograd().uuid())
