"""DoRA in graphs: norms read stored weights, and a layer that it states anew is fused whichever side is narrower."""

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime.captures import records_of
from tests.models import assert_close, disturb


def compiled(spec: str, d_in: int, d_out: int, bias: bool) -> tuple[nn.Module, str]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(d_in, d_out, bias)).double()
    model = disturb(rewrite.compile(net, spec, backend="aot_eager"))
    x = torch.randn(4, 5, d_in, dtype=torch.float64)
    found, eager = model(x), model.forward(x)
    assert_close(found, eager)
    parameters = [p for p in model.parameters() if p.requires_grad]
    dy = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, parameters, dy) for y in (found, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return model, records_of(model)[0].after


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 10), (10, 24)])
def test_a_layer_stated_anew_is_fused_and_not_batched_with_its_factors(d_in, d_out, bias):
    _, program = compiled("dora(r=3)@linear", d_in, d_out, bias)
    assert program.count("scaled_linear(") == 1
    assert "adapted_linear(" not in program
    assert "mul(" not in program
    assert "cat(" not in program
    assert program.count("adapted_row_norms(") == 1


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_stored_weight_is_not_decoded_in_the_graph(bias):
    _, program = compiled("dora(r=3)@linear + nf4@linear", 64, 10, bias)
    assert "decode(" not in program
    assert program.count("adapted_row_norms(") == program.count("scaled_linear(") == 1
