"""Specs on exported programs: the same numbers as on a live model, in a program that stays valid and dynamic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

import rewrite
from rewrite.errors import ResolveError, RewriteError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(12, 8), nn.Linear(12, 8, bias=False)
        self.v_proj, self.o_proj = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x):
        return self.o_proj(torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(12), Attention()

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def exported() -> tuple[Model, ExportedProgram]:
    model = Model().double().eval()
    shape = {"x": {0: Dim("batch", min=2, max=64), 1: Dim("tokens", min=2, max=64)}}
    return model, export(model, (torch.randn(2, 5, 12, dtype=torch.float64),), dynamic_shapes=shape)


SPECS = [
    "lora(r=3)@attn.q,v",
    "lora(r=3, bias=true, alpha=5)@linear",
    "lora(r=2, init=pissa)@attn + full(norm)",
    "lora(r=3)@attn.q[0] + nf4(linear)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_equals_a_live_model(spec):
    model, program = exported()
    torch.manual_seed(1)
    new = rewrite.apply(program, spec)
    torch.manual_seed(1)
    live = rewrite.attach(copy.deepcopy(model), spec)
    tensors = {**dict(live.named_parameters()), **dict(live.named_buffers())}
    for name, value in new.state_dict.items():
        if ".adapters." in name:
            torch.testing.assert_close(value, tensors[name])  # the same start
            nn.init.normal_(value.data, std=0.2)
            tensors[name].data.copy_(value.data)
    x = torch.randn(3, 7, 12, dtype=torch.float64)  # another size than it was exported with
    module = new.module()
    torch.testing.assert_close(module(x), live(x), rtol=1e-12, atol=1e-12)
    module(x).sum().backward()
    live(x).sum().backward()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n, p in live.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, tensors[name].grad, rtol=1e-12, atol=1e-12)


def test_the_program_given_stays_as_it_was():
    model, program = exported()
    text, names = str(program.graph), list(program.state_dict)
    rewrite.apply(program, SPECS[2])
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert str(program.graph) == text
    assert list(program.state_dict) == names
    torch.testing.assert_close(program.module()(x), model(x))


def test_it_saves_and_loads(tmp_path):
    _, program = exported()
    new = rewrite.apply(program, SPECS[0])
    torch.export.save(new, tmp_path / "adapted.pt2")
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(torch.export.load(tmp_path / "adapted.pt2").module()(x), new.module()(x))


def test_only_aten_operators_come_in():
    _, program = exported()
    new = rewrite.apply(program, SPECS[3])
    calls = [n.target for n in new.graph.nodes if n.op == "call_function"]
    assert all(isinstance(t, torch._ops.OpOverload) and t.namespace in ("aten", "rewrite") for t in calls if t)


def test_a_site_that_the_graph_does_not_have():
    _, program = exported()
    with pytest.raises(ResolveError, match="'ffn' matches nothing in Model"):
        rewrite.apply(program, "lora@ffn")


def test_a_site_that_the_graph_does_not_compute():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) @ self.read.weight

    program = export(Reads(), (torch.randn(2, 4),))
    with pytest.raises((RewriteError, ResolveError), match=r"read"):
        rewrite.apply(program, 'lora@"read"')
