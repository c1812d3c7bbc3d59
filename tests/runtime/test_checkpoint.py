"""Adapter checkpoints: what is in them, that they are written whole, and that a bad one changes nothing."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rewrite
from rewrite.runtime.attach import attachment
from rewrite.runtime.checkpoint import CONFIG, TENSORS, fingerprint
from tests.models import batch, build, changed, disturb, frozen, step, traces

SPEC = "lora(r=3)@linear + full(norm)"


class Net(nn.Module):
    def __init__(self, middle: int = 13, twice: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(19, middle), nn.LayerNorm(middle), nn.Linear(middle, 7)
        if twice:
            self.third = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def net(**settings: Any) -> Net:
    torch.manual_seed(3)
    return Net(**settings).double()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter of SPEC on `net()`."""
    rewrite.save(disturb(rewrite.attach(net(), SPEC)), tmp_path / "adapter")
    return tmp_path / "adapter"


def config(folder: Path, **changes: Any) -> None:
    """Change entries of rewrite.json."""
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint."""
    found = load_file(folder / TENSORS)
    change(found)
    save_file(found, folder / TENSORS, {"format": "pt"})


def refuse(model: nn.Module, folder: Path, message: str, error: type[rewrite.Error] = rewrite.RewriteError) -> None:
    """Loading fails with exactly this message, and leaves the model as it was."""
    before, state = frozen(model), attachment(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error) as caught:
        rewrite.load(model, folder)
    assert re.fullmatch(re.escape(message).replace("<folder>", re.escape(str(folder))), str(caught.value))
    assert changed(before, frozen(model)) == []
    assert [p.requires_grad for p in model.parameters()] == flags
    assert attachment(model) is state
    if state is None:
        assert traces(model) == []


def test_what_is_written(saved: Path):
    assert {f.name for f in saved.iterdir()} == {TENSORS, CONFIG}
    model = disturb(rewrite.attach(net(), SPEC))
    found = load_file(saved / TENSORS)
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "first.adapters.lora.A": (3, 19),
        "first.adapters.lora.B": (13, 3),
        "second.adapters.lora.A": (3, 13),
        "second.adapters.lora.B": (7, 3),
        "norm.weight": (13,),
        "norm.bias": (13,),
    }
    written = json.loads((saved / CONFIG).read_text())
    assert written["spec"] == str(rewrite.parse(SPEC)) == "lora(r=3)@linear + full(norm)"
    assert written["fingerprint"] == fingerprint(net()) == fingerprint(model)
    assert written["model"] == "Net"
    assert [row["site"] for row in written["sites"]] == ["first", "second", "norm"]
    assert set(written["versions"]) == {"rewrite", "torch"}


def test_a_fingerprint_is_of_names_and_shapes():
    assert fingerprint(net()) == fingerprint(net().float())
    assert fingerprint(net()) != fingerprint(net(middle=12))
    assert fingerprint(net()) != fingerprint(net(twice=True))
    for spec in ("nf4(linear)", "nf4(linear) + lora(r=2)@linear", "full(linear)"):
        assert fingerprint(rewrite.attach(net(), spec)) == fingerprint(net())


def test_nothing_is_attached(tmp_path: Path):
    with pytest.raises(
        rewrite.RewriteError, match=r"^nothing is attached to this Net: call rewrite\.attach or compile"
    ):
        rewrite.save(net(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_such_folder(tmp_path: Path):
    refuse(net(), tmp_path / "nowhere", "<folder> holds no adapter: rewrite.json is missing")


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_a_missing_file(saved: Path, missing: str):
    (saved / missing).unlink()
    refuse(net(), saved, f"<folder> holds no adapter: {missing} is missing")


def test_a_file_where_a_folder_should_be(saved: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(rewrite.RewriteError, match=r"^cannot read the adapter in .*file: "):
        rewrite.load(net(), file)
    with pytest.raises(rewrite.RewriteError, match=r"^cannot save the adapter to .*file: "):
        rewrite.save(rewrite.load(net(), saved), file)
    assert file.read_text() == ""


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 60, -1, -8])
def test_truncated_tensors(saved: Path, cut: int):
    file = saved / TENSORS
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(rewrite.RewriteError, match=r"adapter\.safetensors is damaged or truncated: "):
        rewrite.load(net(), saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * len(data),
        lambda data: struct.pack("<Q", 2**40) + data[8:],
        lambda data: data[:8] + b"}" + data[9:],
        lambda data: data.replace(b'"F64"', b'"F99"'),
        lambda data: data.replace(b'"shape":[3,19]', b'"shape":[9,19]'),
        lambda data: data + b"more",
    ],
    ids=["garbage", "header-size", "header", "dtype", "shape", "longer"],
)
def test_corrupted_tensors(saved: Path, damage: Callable[[bytes], bytes]):
    file = saved / TENSORS
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    model = net()
    with pytest.raises(rewrite.RewriteError, match=r"adapter\.safetensors is damaged or truncated: "):
        rewrite.load(model, saved)
    assert changed(frozen(net()), frozen(model)) == []
    assert traces(model) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"[]", "it has no spec"),
        (b"null", "it has no spec"),
        (b'{"spec": 5}', "it has no spec"),
    ],
)
def test_a_corrupted_config(saved: Path, text: bytes, message: str):
    (saved / CONFIG).write_bytes(text)
    refuse(net(), saved, f"<folder>/rewrite.json is damaged: {message}")


def test_a_config_nested_beyond_reason(saved: Path):
    (saved / CONFIG).write_text("[" * 100_000)
    with pytest.raises(rewrite.RewriteError, match=r"rewrite\.json is damaged: "):
        rewrite.load(net(), saved)


def test_a_site_table_of_another_kind(saved: Path):
    config(saved, sites=5)
    refuse(net(), saved, "<folder>/rewrite.json is damaged: its sites are no list")


def test_another_format(saved: Path):
    config(saved, format=2)
    refuse(net(), saved, "<folder>/rewrite.json has format 2, this version reads 1: upgrade peft-rewrite")


def test_a_spec_that_is_none(saved: Path):
    tensors(saved, lambda found: None)  # as another tool writes them, without our mark
    config(saved, spec="lorra(r=3)@linear")
    message = "unknown method 'lorra'\n  lorra(r=3)@linear\n  ^^^^^ did you mean 'lora'?"
    refuse(net(), saved, message, rewrite.SpecError)


def test_another_base(saved: Path):
    found, wanted = fingerprint(net(middle=12))[:12], fingerprint(net())[:12]
    refuse(
        net(middle=12),
        saved,
        f"<folder> was saved from a base of other shapes (fingerprint {wanted}, this Net has {found})",
    )


def change_tensors(found: dict[str, torch.Tensor]) -> None:
    del found["first.adapters.lora.A"]
    found["more"] = torch.zeros(2)
    found["second.adapters.lora.B"] = torch.zeros(7, 4)
    found["norm.bias"] = torch.zeros(12)


MISFIT = """the adapter in <folder> does not fit, nothing was loaded:
  missing  first.adapters.lora.A (3, 19)
  extra    more (2,)
  shape    second.adapters.lora.B: file (7, 4), model (7, 3)
  shape    norm.bias: file (12,), model (13,)"""


def test_missing_extra_and_misshapen_tensors_are_all_listed(saved: Path):
    tensors(saved, change_tensors)
    refuse(net(), saved, MISFIT)
    refuse(disturb(rewrite.attach(net(), SPEC)), saved, MISFIT)


def test_a_long_list_is_cut(saved: Path):
    tensors(saved, lambda found: found.update({f"extra{i:02}": torch.zeros(1) for i in range(25)}))
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.load(net(), saved)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  ... and 5 more"


def test_a_model_that_holds_another_spec(saved: Path):
    refuse(
        disturb(rewrite.attach(net(), "lora(r=4)@linear")),
        saved,
        "<folder> holds 'lora(r=3)@linear + full(norm)', this model has 'lora(r=4)@linear': "
        "rewrite.remove(model) first",
    )


def test_tensors_and_config_of_two_different_saves(saved: Path, tmp_path: Path):
    # As a crash between the two files leaves them: the same shapes, but another scale.
    rewrite.save(disturb(rewrite.attach(net(), "lora(r=3, alpha=9)@linear + full(norm)")), tmp_path / "other")
    os.replace(tmp_path / "other" / TENSORS, saved / TENSORS)
    refuse(
        net(), saved, "<folder> holds the tensors of one save and the rewrite.json of another: save the adapter again"
    )


@pytest.mark.parametrize("failing", [TENSORS, CONFIG])
def test_a_save_that_fails_in_the_middle_leaves_the_old_file(
    saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch
):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    model = disturb(rewrite.load(net(), saved))
    sync, failures = os.fsync, []

    def full_disk(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.exists("/proc/self/fd") else failing
        if failing in name:
            failures.append(name)
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(rewrite.RewriteError, match=r"^cannot save the adapter to .*No space left on device"):
        rewrite.save(model, saved)
    assert failures
    after = {f.name: f.read_bytes() for f in saved.iterdir()}
    assert after.keys() == before.keys()  # no half-written file stays behind
    assert after[failing] == before[failing]
    monkeypatch.undo()
    rewrite.load(net(), saved)  # what is there is whole, and of one kind


def test_save_overwrites_and_load_in_place_takes_it(saved: Path):
    model = rewrite.load(net(), saved)
    first = frozen(model)
    rewrite.save(disturb(model, seed=9), saved)
    second = frozen(model)
    assert changed(first, second) != []
    other = rewrite.attach(net(), SPEC)
    parameters = [id(p) for p in other.parameters()]
    assert rewrite.load(other, saved) is other
    assert changed(frozen(other), second) == []
    assert [id(p) for p in other.parameters()] == parameters  # an optimizer keeps its parameters


def test_loading_a_compiled_model_does_not_recompile(tmp_path: Path):
    model, inputs = rewrite.compile(build("small"), "lora(r=3)@linear", backend="eager"), batch("small")
    disturb(model)
    rewrite.save(model, tmp_path)
    expected = step(model, model, inputs)[0]
    disturb(model, seed=8)
    assert not torch.equal(model(**inputs).logits, expected.logits)
    from rewrite.runtime import captures

    graphs = len(captures.records_of(model))
    rewrite.load(model, tmp_path)
    assert torch.equal(model(**inputs).logits, expected.logits)
    assert len(captures.records_of(model)) == graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_loads_onto_a_base_of_another_dtype(saved: Path, dtype: torch.dtype):
    model = rewrite.load(net().to(dtype), saved)
    expected = load_file(saved / TENSORS)
    for name, value in model.state_dict().items():
        if "adapters" in name:
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name].float())
    assert model(torch.randn(2, 19, dtype=dtype)).dtype == dtype


def test_trained_tied_tensors_are_written_once_each(tmp_path: Path):
    model = disturb(rewrite.attach(build("llama", tie_word_embeddings=True), "full(embed, head)"))
    rewrite.save(model, tmp_path)
    loaded = rewrite.load(build("llama", tie_word_embeddings=True), tmp_path)
    assert changed(frozen(model), frozen(loaded)) == []
    assert loaded.get_parameter("lm_head.weight") is loaded.get_parameter("model.embed_tokens.weight")
