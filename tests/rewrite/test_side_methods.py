"""What each side network computes, against the papers' formulas written down in plain PyTorch, and how it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import rewrite
from rewrite.runtime.dry_run import dry_run
from tests.models import assert_close, assert_same, batch, build, disturb, step


def plain(name: str, **changes: Any) -> nn.Module:
    """A model whose weights are frozen, as they are beside a network: some kernels are chosen by that."""
    return build(name, **changes).eval().requires_grad_(False)


def attached(name: str, spec: str, **changes: Any) -> nn.Module:
    return disturb(rewrite.attach(plain(name, **changes), spec))


def leaves(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what trains, by name."""
    return {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}


def stream(base: nn.Module, blocks: Any, inputs: Any) -> list[torch.Tensor]:
    """What goes into the first block of a model and what comes out of each."""
    seen: list[torch.Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))]
    handles += [b.register_forward_hook(lambda m, a, y: seen.append(y)) for b in blocks]
    base(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def compare(model: nn.Module, inputs: Any, logits: torch.Tensor, theta: dict[str, torch.Tensor], tolerance=1e-9):
    """The model's logits and every gradient are those of the formula."""
    labels = inputs["labels"]
    scores = logits if logits.ndim == 2 else logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(scores, labels if logits.ndim == 2 else labels[:, 1:].flatten())
    wanted = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    output, found = step(model, model, inputs)
    assert_close(output.logits, logits, tolerance)
    assert_same(found, wanted, 10 * tolerance)


def layer_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * gain + bias


def test_a_ladder_is_what_the_paper_writes():
    model, inputs, r = attached("llama", "ladder(reduction=4)"), batch("llama"), 4
    base: Any = plain("llama")
    theta = leaves(model)
    rows, tokens = inputs["input_ids"].shape
    head = 16 // r

    def of(path: str, name: str) -> torch.Tensor:
        return theta[f"model.{path}.adapters.ladder{name}"]

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * gain

    def turn(x: torch.Tensor) -> torch.Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, 8, 8 // (head // 2), dtype=x.dtype) * 2 / 16)
        angles = torch.outer(torch.arange(tokens, dtype=x.dtype), frequencies)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def rung(s: torch.Tensor, h: torch.Tensor, path: str) -> torch.Tensor:
        gate = torch.sigmoid(of(path, ".mu") / 0.1)
        s = gate * s + (1 - gate) * (h @ of(path, ".D").T + of(path, ".b"))
        x = norm(s, of(path, ".n1"))
        q, k, v = ((x @ of(path, f".{n}").T).view(rows, tokens, -1, head).transpose(1, 2) for n in "qkv")
        q, k, v = turn(q), turn(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) / head**0.5
        scores = scores + torch.full((tokens, tokens), -torch.inf, dtype=s.dtype).triu(1)
        s = s + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ of(path, ".o").T
        x = norm(s, of(path, ".n2"))
        return s + (F.silu(x @ of(path, ".g").T) * (x @ of(path, ".u").T)) @ of(path, ".w").T

    first, *seen = stream(base, base.model.layers, inputs)
    s = first @ of("layers.0", "_entry.D").T + of("layers.0", "_entry.b")
    for number, h in enumerate(seen):
        s = rung(s, h, f"layers.{number}")
    y = base.model.norm(seen[-1]) + norm(s, of("norm", "_end.n")) @ of("norm", "_end.U").T + of("norm", "_end.c")
    compare(model, inputs, base.lm_head(y), theta, 1e-7)  # the model's rotary angles are float32


@pytest.mark.parametrize("down", ["lowrank", "pool"])
def test_taps_of_qst(down: str):
    """h is seen through two factors or as means; what follows is the ladder's block, with a gate for each channel."""
    method = rewrite.methods()["qst"](reduction=8, r=3, down=down)  # type: ignore[call-arg]
    h = torch.randn(2, 5, 64, dtype=torch.float64)
    if down == "pool":
        means = h.view(2, 5, 8, 8).mean(-1)
        one = torch.ones(8, dtype=torch.float64)
        assert_close(method.tap(h), layer_norm(means, one, 0 * one), 1e-12)
        return
    A, B, m, mb = (torch.randn(*size, dtype=torch.float64) for size in ((3, 64), (8, 3), (8,), (8,)))
    x = h @ A.T
    assert_close(method.tap(h, A=A, B=B, m=m, mb=mb), layer_norm((x * torch.sigmoid(x)) @ B.T, m, mb), 1e-12)


def test_unipt_is_what_the_paper_writes():
    """On an encoder: interaction with the anchor, confidence by means, one sum over layers."""
    model, inputs = attached("vit", "unipt(reduction=4)"), batch("vit")
    base: Any = plain("vit")
    seen, theta = stream(base, base.vit.layers, inputs), leaves(model)

    def of(path: str, name: str) -> torch.Tensor:
        return theta[f"vit.{path}.adapters.unipt{name}"]

    at = [("layers.0", "_entry"), ("layers.0", ""), ("layers.1", "")]
    taps = [
        layer_norm(h @ of(p, f"{e}.D").T + of(p, f"{e}.b"), of(p, f"{e}.n"), of(p, f"{e}.nb"))
        for h, (p, e) in zip(seen, at, strict=True)
    ]
    anchor, rows, confidence = taps[-1], [], []
    for t in taps:
        A = torch.relu(torch.einsum("bqm,bkm->bqk", anchor, t))
        A = A / A.sum(-1, keepdim=True) + torch.eye(A.shape[-1], dtype=A.dtype)
        rows.append(torch.einsum("bqk,bkm->bqm", A, t))
        confidence.append((anchor.mean(1) * t.mean(1)) @ of("layernorm", "_end.v").T)
    c = torch.cat(confidence, 1).softmax(1)
    z = torch.stack([c[:, i, None, None] * row for i, row in enumerate(rows)]).sum(0) @ of("layernorm", "_end.W").T
    s = torch.relu(anchor + layer_norm(z, of("layernorm", "_end.n"), of("layernorm", "_end.nb")))
    logits = base.classifier((base.vit.layernorm(seen[-1]) + s @ of("layernorm", "_end.U").T)[:, 0])
    compare(model, inputs, logits, theta)


def test_sherl_is_what_the_paper_writes():
    model, inputs = attached("vit", "sherl(reduction=4)", num_hidden_layers=3), batch("vit")
    base: Any = plain("vit", num_hidden_layers=3)
    seen, theta = stream(base, base.vit.layers, inputs), leaves(model)

    def of(path: str, name: str) -> torch.Tensor:
        return theta[f"vit.layers.{path}.adapters.sherl{name}"]

    at = [("0", "_entry"), ("0", ""), ("1", "")]
    x = [
        layer_norm(h @ of(p, f"{e}.D").T + of(p, f"{e}.b"), of(p, f"{e}.n"), of(p, f"{e}.nb"))
        for h, (p, e) in zip(seen[:-1], at, strict=True)
    ]
    guide, v = x[-1], of("2", "_late.v")
    redundancy = [torch.stack([torch.relu(F.cosine_similarity(a, b, -1)) for b in x]).sum(0) for a in x]
    weights = torch.stack(
        [torch.relu((a * guide) @ v.T).squeeze(-1) / rho for a, rho in zip(x, redundancy, strict=True)]
    )
    weights = weights / weights.sum(0).clamp_min(1e-6)
    u = guide + (weights.unsqueeze(-1) * torch.stack(x)).sum(0)
    late = base.vit.layers[2](seen[-2] + torch.relu(u) @ of("2", "_late.U").T)
    compare(model, inputs, base.classifier(base.vit.layernorm(late)[:, 0]), theta)
    assert sorted(n.rpartition(".")[2] for n in theta if ".2." in n) == ["U", "v"]  # no rung beside the last block


def test_vqt_is_the_released_formulation_row_by_row():
    """As published: queries of [P; X], keys and values of X alone, rows cut off again behind every block."""
    model, inputs, q = attached("vit", "vqt(q=2)"), batch("vit"), 2
    base: Any = plain("vit")
    theta, layers = leaves(model), base.vit.layers
    X, found = stream(base, layers, inputs)[0], []
    for number, layer in enumerate(layers):
        P, H = (theta[f"vit.layers.{number}.adapters.vqt.{n}"] for n in "PH")
        both = torch.cat([P.expand(X.shape[0], -1, -1), X], 1)
        attend, norm = layer.attention, layer.layernorm_before
        x = (attend.q_proj(norm(both)), attend.k_proj(norm(X)), attend.v_proj(norm(X)))
        queries, keys, values = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in x)
        mixed = (queries @ keys.transpose(-1, -2) / 4).softmax(-1) @ values
        both = both + attend.o_proj(mixed.transpose(1, 2).flatten(2))
        both = both + layer.mlp(layer.layernorm_after(both))
        X = both[:, q:]
        found.append(both[:, :q].flatten(1) @ H.T)
    compare(model, inputs, base.classifier(base.vit.layernorm(X)[:, 0]) + sum(found), theta)


def test_a_ladder_beside_t5_base_is_as_large_as_the_papers():
    config = T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, vocab_size=32128, decoder_start_token_id=0
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    planned = rewrite.plan(model, "ladder(reduction=8)@blocks[1,2,3,5,6,7,9,10,11]")
    assert round(100 * planned.trainable / planned.parameters, 2) == 1.74


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "gib", "tflop"),
    [("ladder(reduction=16)", 0.30, 7.1), ("qst(r=16)", 0.30, 7.1), ("qst(down=pool)@blocks + nf4(base)", 0.20, 7.1)],
)
def test_what_llama_2_7b_keeps_beside_a_side_network(spec: str, gib: float, tflop: float):
    """bfloat16, a row of 512 tokens, min-cut partition; 32 layers from the difference of four and two."""
    counts = []
    for layers in (2, 4):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers)).to(torch.bfloat16)
        ids = torch.zeros(1, 512, dtype=torch.long)
        (record,) = dry_run(rewrite.attach(model, spec), kwargs={"input_ids": ids, "labels": ids, "use_cache": False})
        found: Any = record.counts
        counts.append((found["saved_bytes"], found["forward_flops"] + found["backward_flops"]))
    saved, flops = (two + 15 * (four - two) for two, four in zip(*counts, strict=True))
    assert saved / 2**30 <= gib
    assert flops / 1e12 <= tflop


def test_vqt_keeps_nothing_of_the_patches_but_keys_and_values():
    model = rewrite.attach(plain("vit", hidden_size=96, intermediate_size=224), "vqt")
    (record,) = dry_run(model, kwargs=batch("vit"))
    kept = [tuple(s["shape"]) for s in record.counts["saved"]]  # type: ignore[index]
    assert len(kept) > 4
    patches, head = 17, 24
    assert [shape for shape in kept if patches in shape and shape[-1] != head] == []
    assert [shape for shape in kept if shape and shape[-1] == 224 and patches in shape] == []


def test_what_does_not_fit_says_why():
    refused = {
        ("llama", "ladder(reduction=100)"): "reduction=100 leaves nothing of its width 64",
        ("llama", "vqt"): "its tokens do not see those after them, and a query sees all of them",
        ("llama", "sherl@blocks[-1]"): "sherl joins in front of the last block, and 'sherl.*' has no other",
        ("t5", "vqt@dec.blocks"): "it is not made of an attention and a feed-forward network with one norm each",
        ("llama", "ladder@attn.q"): "ladder cannot stand at 'attn.q'",
    }
    for (name, spec), reason in refused.items():
        with pytest.raises(rewrite.ResolveError, match=reason):
            rewrite.plan(plain(name), spec)


class Louder(nn.Module):
    """A block that does more to its stream than its layers say."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 1.5 * self.block(x, *args, **kwargs)


def test_vqt_refuses_a_block_that_computes_more_than_it_seems():
    model: Any = plain("vit")
    for number in range(2):
        model.vit.layers[number] = Louder(model.vit.layers[number])
    before = list(model.state_dict())
    with pytest.raises(rewrite.RewriteError, match=r"vit\.layers\.0.*(computes more than|not made of)"):
        rewrite.attach(model, "vqt")
    assert list(model.state_dict()) == before


def test_pruning_keeps_a_part_of_the_model():
    """Matrices of a rung are rows and columns of the block's own, one choice of channels for the whole stack."""
    model: Any = rewrite.attach(plain("llama"), "ladder(reduction=4)")
    layers = model.model.layers
    taps = [layer.adapters.ladder.D for layer in layers]
    assert torch.equal(taps[0], taps[1])
    stream = taps[0].argmax(1)
    assert torch.equal(taps[0].sum(1), torch.ones(16, dtype=torch.float64))
    rung, block = layers[1].adapters.ladder, layers[1]
    kept = block.mlp.up_proj.weight[:, stream]
    rows = [int((kept == row).all(1).nonzero()) for row in rung.u]
    assert torch.equal(rung.g, block.mlp.gate_proj.weight[rows][:, stream])
    assert torch.equal(rung.w, block.mlp.down_proj.weight[stream][:, rows])
    pairs = torch.tensor([0, 4, 8, 12])  # evenly spread angles
    queries = torch.cat([pairs + 16 * h for h in range(4)])
    assert torch.equal(rung.q, block.self_attn.q_proj.weight[queries][:, stream])
    values = block.self_attn.v_proj.weight[:, stream]
    v = torch.tensor([int((values == row).all(1).nonzero()) for row in rung.v]).view(2, 4)
    assert (v // 16 == torch.arange(2)[:, None]).all()
    columns = torch.cat([v[h // 2] % 16 + 16 * h for h in range(4)])
    assert torch.equal(rung.o, block.self_attn.o_proj.weight[stream][:, columns])
