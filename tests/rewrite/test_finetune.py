"""The main job on tiny models: what it trains, measures, checks, writes and refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig

import rewrite
from rewrite.cli import main
from rewrite.errors import RewriteError
from rewrite.finetune import Job, bases, checks, corpus, finetune, job, training
from rewrite.folders import model_of, tokenizer_of

WORDS = ["[UNK]", *"the a quick slow brown red fox dog cat jumps sleeps over under lazy and . then".split()]
SENTENCES = "the quick brown fox jumps over the lazy dog . then a slow red cat sleeps under the fox and the dog .\n"
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as Hugging Face writes one: a tiny random Llama and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(WORDS))).save_pretrained(folder)
    words: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("a.txt", "b.md"):
        (folder / name).write_text(SENTENCES * 20, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(model: Path, data: Path, tmp_path: Path) -> Run:
    """A job on the tiny folder, three steps, without Inductor."""

    def make(**changes: Any) -> Job:
        same: dict[str, Any] = {"model": str(model), "data": str(data), "out": str(tmp_path / "out"), "steps": 3}
        return Job(**{**same, "batch": 4, "length": 16, "backend": "eager", "learning_rate": 1e-2, **changes})

    return make


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as anything is trained."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("training began")

    monkeypatch.setattr(job, "train", refuse)
    monkeypatch.setattr(bases, "train", refuse)


def silent(_: str) -> None:
    """Says nothing."""


# the whole job


SPECS = [
    "lora(r=4)@attn.q,v",
    "lora(r=4, dropout=0.1)@linear + full(norm) + nf4(base)",
    "adalora(r=4, steps=3)@linear-head",
    "lisa(active=1, every=1)@blocks + fused_update",
    "lora(r=4)@linear-head + ist(active=1, every=1)@blocks",
    "lora(r=4)@linear + mezo(eps=0.01)",
    "green(rho=0.7)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_from_a_folder_to_an_adapter(capsys: pytest.CaptureFixture[str], tiny: Run, spec: str):
    asked = tiny(spec=spec)
    options = {"model": asked.model, "data": asked.data, "spec": spec, "out": asked.out, "lr": 1e-2}
    options |= {"steps": 3, "batch": 4, "length": 16, "backend": "eager"}
    assert main(["finetune", *(f"--{name}={value}" for name, value in options.items())]) == 0
    said, out = capsys.readouterr().out, Path(asked.out)
    assert f"spec     {spec}\n" in said
    assert "base     LlamaForCausalLM in " in said
    assert said.count(" ok\n") == 3
    assert "saved and loaded on a fresh base             0.0e+00" in said
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter.safetensors",
        "diff.html",
        "result.json",
        "rewrite.json",
    ]
    found = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert f"{math.exp(found['loss']):.3f}" in said
    assert f"{found['trainable']:,} parameters" in said
    assert len(found["losses"]) == 3
    assert found["loss"] != found["base_loss"]


def test_what_is_written_is_what_was_measured(tiny: Run, model: Path):
    asked = tiny(spec="lora(r=4)@linear")
    result = finetune(asked, silent)
    words = tokenizer_of(model)
    held = corpus.split(corpus.tokenise(corpus.read(asked.data), words), 16, 4, "").held
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    assert exact_loss(plain, held) == pytest.approx(result.base_loss, rel=1e-5)
    rewrite.load(plain, asked.out)
    assert exact_loss(plain, held) == pytest.approx(result.loss, rel=1e-5)
    assert result.trainable == rewrite.plan(model_of(model, "cpu"), "lora(r=4)@linear").trainable
    assert result.parameters == sum(p.numel() for p in model_of(model, "cpu").parameters())


@torch.no_grad()
def exact_loss(model: nn.Module, rows: torch.Tensor) -> float:
    """Cross-entropy of every next token, written out."""
    logits = model(input_ids=rows).logits[:, :-1].double()
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def test_a_half_precision_base_keeps_its_dtype(tiny: Run, model: Path, tmp_path: Path):
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    tokenizer_of(model).save_pretrained(tmp_path / "half")
    result = finetune(tiny(model=str(tmp_path / "half"), spec="lora(r=4)@linear"), silent)
    assert result.holds
    assert {check.allowed for check in result.checks} == {checks.allowed(half)}
    saved = load_file(tmp_path / "out" / "adapter.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_seed_repeats_and_another_differs(tiny: Run, tmp_path: Path):
    seeds = [0, 0, 1]
    files = [tmp_path / str(i) / "adapter.safetensors" for i in range(3)]
    results = [finetune(tiny(out=str(f.parent), seed=s), silent) for f, s in zip(files, seeds, strict=True)]
    assert results[0].losses == results[1].losses != results[2].losses
    first, second, third = (load_file(file) for file in files)
    assert all(first[name].equal(second[name]) for name in first)
    assert not any(first[name].equal(third[name]) for name in first)


def test_the_built_in_model(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out, base = str(tmp_path / "out"), tmp_path / "base"
    argv = ["finetune", "--out", out, "--steps=2", "--batch=2", "--length=32", "--backend=eager"]
    assert main([*argv, "--pretrain-steps=2", "--save-base", str(base)]) == 0
    first = capsys.readouterr().out
    assert "base     a byte-level Llama, 1,869,504 parameters, pre-trained on " in first
    assert "data     pydoc_data.topics: " in first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    # The base that was kept is the base that was adapted.
    kept = json.loads(Path(out, "result.json").read_text(encoding="utf-8"))
    assert main([*argv, "--model", str(base), "--lr=1e-2"]) == 0
    again = json.loads(Path(out, "result.json").read_text(encoding="utf-8"))
    assert again["base_loss"] == kept["base_loss"]


def test_a_form_that_differs_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Run
):
    merge = rewrite.merge

    def wrong(adapted: nn.Module) -> nn.Module:
        merged = merge(adapted)
        with torch.no_grad():
            merged.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] += 0.1
        return merged

    monkeypatch.setattr(rewrite, "merge", wrong)
    asked = tiny(steps=1)
    argv = [f"--{name}={getattr(asked, name)}" for name in ("model", "data", "out", "batch", "length", "backend")]
    assert main(["finetune", *argv, "--steps=1"]) == 1
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.endswith("FAILED")] == ["merged"]


# what cannot be done is said before training


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": "lora(r=0)@attn.q"}, "lora(r) must be at least 1, got 0"),
        ({"spec": "lora@cross.q"}, "lora@cross.q\n       ^^^^^^^"),
        ({"spec": "nf4(base)"}, "'nf4(base)' trains nothing: add a method that does"),
        ({"model": "{tmp}/none"}, "no such model folder: {tmp}/none"),
        ({"model": "{tmp}"}, "{tmp} is not a Hugging Face model folder: it has no config.json"),
        ({"model": "{tmp}/vit"}, "{tmp}/vit holds a vit model, which is not a causal language model"),
        ({"model": "{tmp}/wordless"}, "cannot load the tokenizer in {tmp}/wordless"),
        ({"model": "{tmp}/weightless"}, "cannot load the model in {tmp}/weightless"),
        ({"model": "{tmp}/small"}, "gives token 17, the model knows 5"),
        ({"data": "{tmp}/none.txt"}, "no such text file or folder: {tmp}/none.txt"),
        ({"data": "{tmp}/empty.txt"}, "{tmp}/empty.txt holds no text"),
        ({"data": "{tmp}/binary"}, "{tmp}/binary is not a text file"),
        ({"data": "{tmp}/hidden"}, "{tmp}/hidden holds no text"),
        ({"data": "{tmp}/short.txt"}, "has 3 tokens, and batches of 4 x 16 need at least 80: give more text"),
        ({"length": 65}, "--length 65 is more than the 64 positions of this model"),
        ({"out": "{tmp}/short.txt/out"}, "cannot write to --out {tmp}/short.txt/out: Not a directory"),
        ({"device": "abacus"}, "cannot use --device abacus: "),
        ({"backend": "fast"}, "unknown backend 'fast'"),
        ({"model": None, "save_base": "{tmp}"}, "--save-base {tmp} exists already"),
        ({"save_base": "{tmp}/new"}, "--save-base keeps the built-in base model"),
    ],
)
def test_refused_before_training(tiny: Run, model: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    (tmp_path / "empty.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "short.txt").write_text("the lazy dog", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0\0")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".notes.txt").write_text(SENTENCES * 20, encoding="utf-8")
    ViTConfig(**{k: SIZES[k] for k in ("hidden_size", "num_hidden_layers")}).save_pretrained(tmp_path / "vit")
    LlamaConfig(**SIZES, vocab_size=len(WORDS)).save_pretrained(tmp_path / "wordless")
    for name, size in {"weightless": len(WORDS), "small": 5}.items():
        LlamaConfig(**SIZES, vocab_size=size).save_pretrained(tmp_path / name)
        tokenizer_of(model).save_pretrained(tmp_path / name)
    changes = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(rewrite.Error) as error:
        finetune(tiny(**changes), silent)
    assert message.replace("{tmp}", str(tmp_path)) in str(error.value)


# text


def test_read_keeps_the_order_of_names_and_skips_what_is_no_text(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    files = {"b.txt": b"two", "sub/a.txt": b"three", "a.txt": b"one", ".hidden": b"no", "c.bin": b"\0\1", "d": b"  "}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert [(t.name, t.text) for t in corpus.read(tmp_path)] == [
        ("a.txt", "one"),
        ("b.txt", "two"),
        (str(Path("sub", "a.txt")), "three"),
    ]


@pytest.mark.parametrize(
    ("content", "text", "replaced"),
    [
        ("naïve".encode(), "naïve", 0),
        (b"na\xefve \xff!", "na\ufffdve \ufffd!", 2),
        ("\ufffd is in the file".encode(), "\ufffd is in the file", 0),
        ("marked".encode("utf-8-sig"), "marked", 0),
        ("sixteen".encode("utf-16"), "sixteen", 0),
        (b"\xfe\xff\0b\0e", "be", 0),
    ],
)
def test_encodings(tmp_path: Path, content: bytes, text: str, replaced: int):
    file = tmp_path / "text"
    file.write_bytes(content)
    assert corpus.read(file) == [corpus.Text("text", text, replaced)]


def test_invalid_bytes_are_told(tiny: Run, tmp_path: Path):
    file, said = tmp_path / "latin.txt", []
    file.write_bytes((SENTENCES * 20).encode() + b"\xe9\xe8")
    finetune(tiny(data=str(file), steps=1), said.append)
    assert "note     2 invalid bytes in latin.txt were replaced" in "\n".join(said)


def test_long_texts_are_read_in_pieces_without_loss():
    line, words = "the quick brown fox\n", bases.byte_tokenizer()
    text = line * (3 * corpus._PIECE // len(line))
    assert len(list(corpus._pieces(text))) == 3
    ids = corpus.tokenise([corpus.Text("long", text)], words)
    assert bytes(ids.tolist()) == text.encode()


@pytest.mark.parametrize("text", ["plain\n\ttext", "é 漢字 🙂", "\x00\x07\x7f\xa0\xad", " two  spaces "])
def test_a_token_of_the_built_in_model_is_a_byte(text: str):
    words = bases.byte_tokenizer()
    assert words(text)["input_ids"] == list(text.encode())
    assert words.decode(list(text.encode())) == text


def test_the_texts_that_come_with_python():
    english, source = corpus.english(), corpus.python_source()
    paragraphs = [p for text in english for p in text.text.split("\n\n") if p]
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    assert "topics.py" not in {text.name for text in source}
    assert all(paragraph not in text.text for text in source for paragraph in paragraphs if len(paragraph) > 200)


@given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 400))
def test_split(length: int, batch: int, extra: int):
    tokens = torch.arange(length * (batch + 1) + extra)
    blocks = corpus.split(tokens, length, batch, "text")
    count = len(tokens) // length
    assert len(blocks.train) >= batch
    assert 1 <= len(blocks.held) <= max(1, count // 10)
    starts = torch.cat([blocks.train, blocks.held])[:, 0].tolist()
    assert sorted(starts) == list(range(0, count * length, length))  # disjoint, nothing twice, nothing lost


def test_held_out_blocks_are_spread():
    held = corpus.split(torch.arange(4000), 10, 8, "text").held[:, 0] // 10
    assert held.tolist() == list(range(5, 400, 10))


def test_batches_take_every_block_once_per_epoch():
    rows = torch.arange(10)[:, None]
    order = torch.cat(list(corpus.batches(rows, 4, 5, seed=3))).flatten().tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


# the loop


class Bigram(nn.Module):
    """The smallest language model: a table of next-token logits, with the interface of a Hugging Face one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(size, size)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        logits = self.table(input_ids)
        self.loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return self


def test_training_learns():
    rows = (torch.arange(16)[:, None] + torch.arange(8)) % 7  # each token has one successor
    model = Bigram(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, weight_decay=0.0)
    curve = training.train(model, rows, optimizer, steps=60, batch=4, seed=0, progress="train")
    assert curve.losses[0] > 1.5
    assert curve.losses[-1] < 0.05
    assert len(curve.seconds) == 60
    assert training.evaluate(model, rows, 4, "held") < 0.05


def test_a_loss_that_is_no_number_stops_training():
    model = Bigram(3)
    nn.init.constant_(model.table.weight, math.inf)
    rows, optimizer = torch.zeros(4, 4, dtype=torch.int64), torch.optim.AdamW(model.parameters(), lr=1.0)
    with pytest.raises(RewriteError, match=r"^the loss is nan at step 1: try a smaller --lr$"):
        training.train(model, rows, optimizer, steps=5, batch=2, seed=0, progress="")


def test_evaluation_weighs_every_block_alike_and_keeps_one_shape():
    model, rows = Bigram(5), torch.randint(5, (7, 6))
    model.table.weight.data *= 3
    found = training.evaluate(model, rows, 4, "held")
    each = [model(row[None], row[None]).loss.item() for row in rows]
    assert found == pytest.approx(sum(each) / 7, rel=1e-6)
    assert model.shapes[:2] == [(4, 6), (4, 6)]


def test_the_learning_rate_rises_and_falls():
    rates = [training.rate(step, 200) for step in range(200)]
    top = rates.index(max(rates))
    assert max(rates) == 1
    assert top == 9
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_the_median_step_leaves_the_first_one_out():
    assert training.Curve(seconds=[30.0, 2.0, 1.0, 9.0]).step == 2.0
    assert training.Curve(seconds=[30.0]).step == 30.0


# the checks


def test_differences_are_relative_to_the_largest_logit():
    wanted = torch.tensor([[4.0, -8.0]])
    assert checks.difference(torch.tensor([[4.0, -7.0]]), wanted) == 1 / 8
    assert checks.difference(wanted, wanted) == 0


@pytest.mark.parametrize(("found", "holds"), [(0.0, True), (1e-5, True), (3e-5, False), (math.nan, False)])
def test_a_check_holds_within_what_is_allowed(found: float, holds: bool):
    assert checks.Check("form", found, 2e-5).holds is holds


def test_the_coarsest_dtype_says_what_is_allowed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    assert checks.allowed(model[0]) < checks.allowed(model[1]) == checks.allowed(model)
