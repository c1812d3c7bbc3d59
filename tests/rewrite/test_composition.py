"""Several methods at one site: a fixed order of stages, merged equal to unmerged, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from tests.models import assert_close, assert_same, changed, disturb, frozen, gradients, traces

COMPOSED = [
    ("lora(r=2)", "ia3"),
    ("lora(r=2)", "lora(r=3)"),
    ("dora(r=2)", "lora(r=3)"),
    ("dora(r=2, init=pissa)", "ssf"),
    ("oft(block=3)", "lora(r=2, bias=true)"),
    ("hira(r=2)", "loha(r=2)", "ia3(scales=input)"),
    ("oft(block=5)", "dora(r=2)"),
    ("vera(r=4)", "bitfit", "ia3"),
    ("glora(r=2)", "lora(r=2)"),
    ("c3a(block_size=3)", "fourierft(n=20)", "shira(r=1)"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(15, 9), nn.Linear(9, 21)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def build() -> Net:
    torch.manual_seed(3)
    return Net().double()


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def spec(methods: tuple[str, ...]) -> str:
    return " + ".join(f'{method}@"first","second"' for method in methods)


@pytest.mark.parametrize("methods", COMPOSED, ids=" + ".join)
def test_merged_equals_unmerged(methods):
    torch.manual_seed(7)
    model, base = disturb(rewrite.attach(build(), spec(methods))), build()
    adapted = model(batch())
    assert not torch.allclose(adapted, base(batch()))
    assert_close(rewrite.merge(model)(batch()), adapted)
    assert traces(model) == []


@pytest.mark.parametrize("methods", COMPOSED, ids=" + ".join)
def test_remove_gives_the_base_back(methods):
    model, base = disturb(rewrite.attach(build(), spec(methods))), build()
    rewrite.remove(model)
    assert changed(frozen(base), frozen(model)) == []
    assert traces(model) == []


ACROSS = [("lora(r=2)", "ia3"), ("dora(r=2)", "lora(r=3)"), ("vera(r=4)", "bitfit", "ia3")]


@pytest.mark.parametrize("methods", ACROSS, ids=" + ".join)
def test_stages_decide_whatever_the_order_in_the_spec(methods):
    torch.manual_seed(7)
    model, other = disturb(rewrite.attach(build(), spec(methods))), rewrite.attach(build(), spec(methods[::-1]))
    other.load_state_dict(model.state_dict())
    assert_close(other(batch()), model(batch()))


@pytest.mark.parametrize("methods", COMPOSED, ids=" + ".join)
def test_compiled_equals_eager(methods):
    torch.manual_seed(7)
    model = disturb(rewrite.compile(build(), spec(methods), backend="eager"))
    results = []
    for stance in ("default", "force_eager"):
        with torch.compiler.set_stance(stance):
            y = model(batch())
        y.square().sum().backward()
        results.append((y.detach(), gradients(model)))
    (y, found), (expected, wanted) = results
    assert_close(y, expected)
    assert_same(found, wanted)


def test_methods_stand_in_a_rounded_base():
    torch.manual_seed(7)
    model = disturb(rewrite.attach(build(), spec(("dora(r=2)", "lora(r=2)")) + ' + nf4("first","second")'))
    adapted = model(batch())
    assert_close(rewrite.merge(model)(batch()), adapted)
