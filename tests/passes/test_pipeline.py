"""The pipeline on captured modules: same function and gradients after every pass, and what each pass leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from rewrite.errors import RewriteError
from rewrite.passes import pipeline
from rewrite.passes.insert import is_typed
from rewrite.passes.pipeline import PIPELINE, Pass
from rewrite.passes.record import GraphRecord
from tests.passes.graphs import capture, inputs


class Attention(nn.Module):
    """Query, key and value side by side, as rows of a block, with an output projection."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(10, 6, bias), nn.Linear(10, 6, bias)
        self.v_proj, self.o_proj = nn.Linear(10, 6, bias), nn.Linear(6, 10, bias)

    def forward(self, x):
        mixed = torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)
        return self.o_proj(mixed)


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": Attention(bias)}) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["attn"](x)
        return x


def adapted(spec: str, bias: bool = True) -> nn.Module:
    model = Model(bias).double()
    rewrite.attach(model, spec)
    for name, parameter in model.named_parameters():
        if "adapters" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def gradients(model: nn.Module, y: torch.Tensor) -> list[torch.Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), wanted))


SPECS = {
    "q v": "lora(r=3)@attn.q,v",
    "all": "lora(r=3, alpha=5)@linear",
    "bias": "lora(r=2, bias=true, scale=rs)@attn",
    "residual": "lora(r=2, init=pissa)@attn.k,o",
    "two": "lora(r=2)@attn.q + lora(r=3)@attn.q,o",
    "dropout": "lora(r=2, dropout=0.3)@linear",
    "nf4": "lora(r=2)@attn.q,o + nf4(linear)",
    "nf4 double": "nf4(linear, double_quant=true) + lora(r=2)@attn.v",
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("steps", range(1, len(PIPELINE) + 1), ids=[f"up to {p.name}" for p in PIPELINE])
def test_every_prefix_of_the_pipeline_keeps_the_function(spec, bias, steps):
    model, x = adapted(spec, bias), torch.randn(2, 4, 10, dtype=torch.float64)
    gm = capture(model, x)
    pipeline.run(gm, GraphRecord("test"), PIPELINE[:steps])
    torch.manual_seed(5)  # of the dropout
    (y,) = gm(*inputs(gm))
    torch.manual_seed(5)
    expected = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(model, y), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def run(spec: str) -> tuple[torch.fx.GraphModule, GraphRecord]:
    gm = capture(adapted(spec), torch.randn(2, 4, 10, dtype=torch.float64))
    record = GraphRecord("test")
    pipeline.run(gm, record)
    return gm, record


def count(gm: torch.fx.GraphModule, name: str) -> int:
    return sum(name in str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def test_siblings_share_one_down_projection():
    gm, record = run("lora(r=3)@attn.q,k,v,o")
    batch = next(p for p in record.passes if p.name == "batch")
    assert [e.site for e in batch.edits] == [
        "layers.0.attn.[q_proj,k_proj,v_proj]",
        "layers.1.attn.[q_proj,k_proj,v_proj]",
    ]
    assert count(gm, "adapted_linear") == 8
    assert count(gm, "linear") - count(gm, "adapted_linear") == 4  # one shrink for q, k, v, one for o, per layer


def test_siblings_behind_dropout_share_one_product_with_masks_of_their_own():
    gm, record = run("lora(r=3, dropout=0.2)@attn.q,k,o + lora(r=2, dropout=0.4)@attn.v")
    products = [n for n in gm.graph.nodes if "dropped_linear" in str(n.target)]
    assert [n.args[3:] for n in products] == [([3, 3, 2], [0.2, 0.2, 0.4]), ([3], [0.2])] * 2
    assert count(gm, "rewrite.dropout") == 0
    assert count(gm, "draw") == 8  # a seed a site
    assert count(gm, "adapted_linear") == 8
    assert not record.notes


def test_every_adapter_is_inserted_and_fused_at_its_site():
    _, record = run("lora(r=3)@attn.q,v")
    sites = [f"layers.{i}.attn.{p}_proj" for i in range(2) for p in "qv"]
    for name in ("insert", "fuse"):
        done = next(p for p in record.passes if p.name == name)
        assert sorted(e.site for e in done.edits) == sites
    assert not record.notes


def test_a_quantised_weight_is_decoded_inside_the_fused_operator():
    gm, record = run("lora(r=3)@attn.q + nf4(linear)")
    assert count(gm, "adapted_linear") == 8
    assert count(gm, "decode") == 0
    assert not record.notes


def test_a_shift_becomes_part_of_the_bias():
    gm, record = run("lora(r=2, bias=true)@attn.q + lora(r=3, bias=true)@attn.q")
    assert count(gm, "adapted_linear") == 2
    assert len(next(p for p in record.passes if p.name == "fuse").edits) == 8  # two branches and two shifts a layer
    assert not record.notes


def test_a_trained_weight_is_left_alone_and_reported():
    gm, record = run("lora(r=3)@attn.q + full(attn.q)")
    assert count(gm, "adapted_linear") == 0
    assert {n.site for n in record.notes} == {"layers.0.attn.q_proj", "layers.1.attn.q_proj"}
    assert all("its base weight is trained" in n.text for n in record.notes)


def test_a_pass_with_nothing_to_do_makes_no_edits():
    gm, _ = run("nf4(linear)")
    again = GraphRecord("again")
    text = str(gm.graph)
    pipeline.run(gm, again)
    assert not again.edits
    assert str(gm.graph) == text


def test_a_pass_that_leaves_a_typed_node_is_caught():
    gm = capture(adapted("lora(r=3)@attn.q"), torch.randn(2, 4, 10, dtype=torch.float64))
    assert any(is_typed(n) for n in gm.graph.nodes)
    with pytest.raises(RewriteError, match=r"pass idle left the typed node \w+ at layers\.0\.attn\.q_proj"):
        pipeline.run(gm, GraphRecord("test"), (Pass("idle", ()),))


def test_dump_writes_a_program_after_every_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITE_DUMP", str(tmp_path))
    _, record = run("lora(r=3)@attn.q")
    files = sorted(p.name for p in (tmp_path / "test").iterdir())
    names = ["captured", *(p.name for p in PIPELINE)]
    assert files == [f"{number}_{name}.py" for number, name in enumerate(names)]
    text = (tmp_path / "test" / files[-1]).read_text()
    compile(text, files[-1], "exec")  # a Python program
    assert text == record.after
    assert text.startswith("# after fuse: 2 edits")
    assert "# layers.0.attn.q_proj" in text
    assert "<- fuse_branch" in text
    assert "num_users" not in text


def test_passes_log_through_standard_loggers(caplog):
    with caplog.at_level("INFO", logger="rewrite"):
        run("lora(r=3)@attn.q")
    assert [r.name for r in caplog.records] == ["rewrite.passes.pipeline"] * len(PIPELINE)
    assert "after insert: 2 edits" in caplog.text
