"""Specs on exported programs: the same numbers as on a live model, in a program that stays valid and dynamic."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram, export

import rewrite
from rewrite.errors import ResolveError, RewriteError
from rewrite.runtime.attach import adapter_of, require


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


class Reads(nn.Module):
    """One layer is called, the weight of one is read, and one is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read, self.idle = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        return self.used(x) @ self.read.weight


def test_a_weight_that_the_graph_reads():
    model, x = Reads(), torch.randn(2, 4, dtype=torch.float64)
    program = export(model, (x,))
    torch.manual_seed(1)
    new = rewrite.apply(program, 'lora(r=2)@"read"')
    torch.manual_seed(1)
    same(new, rewrite.attach(model, 'lora(r=2)@"read"'), x)


def test_a_site_that_the_graph_does_not_compute():
    program = export(Reads(), (torch.randn(2, 4, dtype=torch.float64),))
    with pytest.raises((RewriteError, ResolveError), match=r"lora cannot stand at '\"idle\"'"):
        rewrite.apply(program, 'lora@"idle"')


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 11, 9)), nn.Parameter(torch.randn(3, 9, 11))

    def forward(self, x):
        h = torch.stack([F.linear(x, self.up[i]) for i in range(3)])
        return (torch.tanh(h.flatten(1, -2)) @ self.down.transpose(1, 2)).sum(0).view(x.shape)


class Kinds(nn.Module):
    """Layers of every map; the head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(23, 6, padding_idx=0), nn.Linear(6, 23, bias=False)
        self.head.weight = self.embed.weight
        self.wide = nn.Conv1d(6, 10, 3, stride=1, padding="same", groups=2)
        self.plain = nn.Conv1d(10, 8, 3, padding=1, bias=False)
        self.around = nn.Conv1d(8, 9, 3, padding=1, padding_mode="circular")
        self.back = nn.ConvTranspose1d(9, 6, 2, stride=2, groups=3, output_padding=1)
        self.stack = Stack()

    def forward(self, ids):
        x = self.around(self.plain(self.wide(self.embed(ids).transpose(1, 2))))
        x = x + self.stack(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.back(x).transpose(1, 2))


def adapter_tensors(live: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters of a live model by the names that they have in files and programs."""
    return {
        f"{graft.path}.adapters.{graft.name}.{slot}": value
        for graft in require(live).grafts
        if graft.where in ("output", "weight")
        for slot, value in adapter_of(live.get_submodule(graft.path), graft).tensors().items()
    }


def same(adapted: ExportedProgram, live: nn.Module, ids: torch.Tensor) -> None:
    """Equal outputs and gradients; adapters get the same values first."""
    tensors = {**dict(live.named_parameters()), **dict(live.named_buffers())}
    tensors |= adapter_tensors(live)
    for name, value in adapted.state_dict.items():
        if ".adapters." in name:
            torch.testing.assert_close(value, tensors[name])  # the same start
            tensors[name].data.copy_(nn.init.normal_(value.data, std=0.2))
    module = adapted.module()
    torch.testing.assert_close(module(ids), live(ids), rtol=1e-12, atol=1e-12)
    module(ids).square().sum().backward()
    live(ids).square().sum().backward()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, tensors[name].grad, rtol=1e-12, atol=1e-12)


def kinds() -> tuple[nn.Module, ExportedProgram]:
    model = Kinds().double()
    return model, export(model, (torch.randint(0, 23, (2, 5)),), dynamic_shapes=({0: Dim("batch")},))


OTHERS = ["embed", "conv", '"wide"', '"back","plain"', '"stack"', 'head,"stack",conv,embed']


@pytest.mark.parametrize("arguments", ["r=2", "r=2, alpha=3, init=olora"])
@pytest.mark.parametrize("sites", OTHERS)
def test_other_layers_equal_a_live_model(sites, arguments):
    model, program = kinds()
    spec = f"lora({arguments})@{sites}"
    torch.manual_seed(1)
    new = rewrite.apply(program, spec)
    torch.manual_seed(1)
    same(new, rewrite.attach(copy.deepcopy(model), spec), torch.randint(0, 23, (3, 5)))


@pytest.mark.parametrize("spec", ['lora(r=2)@"stack" + nf4("stack")', 'lora(r=2)@"stack" + lora(r=3)@"stack"'])
def test_several_grafts_at_one_weight(spec):
    model, program = kinds()
    torch.manual_seed(1)
    new = rewrite.apply(program, spec)
    torch.manual_seed(1)
    same(new, rewrite.attach(copy.deepcopy(model), spec), torch.randint(0, 23, (3, 5)))
