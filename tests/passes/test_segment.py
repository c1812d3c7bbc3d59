"""Adapters that the rows of a batch choose: computed for those rows, equal to every adapter times its gate."""

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime.captures import records_of
from tests.models import assert_close, disturb

CHOICES = ["en", None, {"en": 0.5, "fr": 2.0}, "it", "fr"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(13, 21), nn.Linear(13, 7, bias=False), nn.Linear(28, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(torch.cat([self.q(x), self.k(x)], -1)))


def inputs(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def named(spec: str, compiled: bool) -> nn.Module:
    torch.manual_seed(3)
    net = Net().double()
    torch.manual_seed(9)
    model = rewrite.compile(net, spec, backend="aot_eager") if compiled else rewrite.attach(net, spec)
    return disturb(model)


SPECS = {
    "ranks": "en: lora(r=1, alpha=3)@linear + fr: lora(r=4)@linear + it: lora(r=7, scale=rs)@linear",
    "some": 'en: lora(r=2)@linear + fr: lora(r=3)@"q" + it: lora(r=5)@"o" + it: lora(r=2)@"k"',
    "beside others": "en: lora(r=2)@linear + fr: ia3@linear + it: lora(r=3)@linear",
    "nf4": "en: lora(r=2)@linear + fr: lora(r=3)@linear + it: lora(r=1)@linear + nf4(base)",
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("lead", [(5, 6), (5, 1), (5,)], ids=str)
def test_compiled_rows_equal_eager_rows_and_so_do_gradients(spec, lead):
    x, found = inputs(*lead), []
    for compiled in (False, True):
        model = rewrite.use(named(spec, compiled), per_row=CHOICES)
        y = model(x)
        y.square().sum().backward()
        found.append((y, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
        if compiled:
            assert "segment" in edits_of(model)
    assert_close(found[1][0], found[0][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert_close(found[1][1][name], gradient)


def edits_of(model: nn.Module) -> list[str]:
    return [e.rule for record in records_of(model) for step in record.passes for e in step.edits]


def test_siblings_share_their_shrink_and_switching_captures_nothing():
    model = named(SPECS["ranks"], True)
    for choices in (CHOICES, ["fr"] * 5, [None] * 5, [{"en": -1.0}, "it", "it", None, "fr"]):
        eager = rewrite.use(named(SPECS["ranks"], False), per_row=choices)
        assert_close(rewrite.use(model, per_row=choices)(inputs(5, 3)), eager(inputs(5, 3)))
    assert len(records_of(model)) == 1
    assert edits_of(model).count("segment") == 3
    assert edits_of(model).count("batch_segments") == 1
    assert "linear(" not in records_of(model)[0].after.split("# q")[1], "the products of all adapters are gone"


def test_few_ranks_in_a_wide_layer_stay_one_product():
    net = nn.Sequential(nn.Linear(256, 320))
    model = disturb(rewrite.compile(net, "en: lora(r=2)@linear + fr: lora(r=3)@linear", backend="eager"))
    rewrite.use(model, per_row=["en", "fr", None])(torch.randn(3, 4, 256))
    assert "segment" not in edits_of(model)


def test_one_adapter_for_all_rows_stays_one_product():
    model = named(SPECS["ranks"], True)
    rewrite.use(model, "fr")(inputs(5, 3))
    assert "segment" not in edits_of(model)
