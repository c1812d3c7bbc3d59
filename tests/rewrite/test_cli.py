"""The command line: each command on real folders, and what it says when it cannot."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, T5Config, ViTConfig

import rewrite
from rewrite import cli, progress
from rewrite.cli import main
from rewrite.codegen.kernels import aot

COMMANDS = ["plan", "finetune", "diff", "report", "methods", "kernels"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "bert": BertConfig(**SIZES, vocab_size=50, architectures=["BertForSequenceClassification"]),
    "vit": ViTConfig(**SIZES, image_size=16, patch_size=8, architectures=["ViTForImageClassification"]),
    "t5": T5Config(vocab_size=50, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, architectures=["T5Model"]),
    "bare": LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2),
}
Folder = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes config.json of a named configuration (or the given text) to a folder and returns its path."""

    def make(name: str, text: str | None = None) -> str:
        place = tmp_path / name
        place.mkdir()
        if text is None:
            CONFIGS[name].save_pretrained(place)
        else:
            (place / "config.json").write_text(text, encoding="utf-8")
        return str(place)

    return make


def failed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command says on stderr when it cannot do what is asked."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(capsys: pytest.CaptureFixture[str], command: str):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    example = " ".join(capsys.readouterr().out.partition("example: ")[2].split())
    program, *argv = shlex.split(example)
    args = cli._parser().parse_args(argv)
    assert (program, args.command) == ("rewrite", command)
    rewrite.parse(getattr(args, "spec", "lora@linear"))


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)
    assert "example: rewrite plan --spec" in out


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"rewrite {rewrite.__version__}\n"


def test_plan_asks_for_a_spec_or_sites(capsys: pytest.CaptureFixture[str]):
    assert main(["plan"]) == 2
    assert "give --spec" in capsys.readouterr().err


def test_plan_prints_sites(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--sites", "attn.q,ffn.down"]) == 0
    some = capsys.readouterr().out
    assert main(["plan", "--sites"]) == 0
    every = capsys.readouterr().out
    assert "sites at attn.q,ffn.down" in some
    assert all(word in every for word in ("attn.q", "ffn.gate", "norm", "embed", "head"))


@pytest.mark.parametrize("argv", [[], ["plam"], ["diff"], ["finetune"], ["plan", "--spec"]])
def test_usage_errors(capsys: pytest.CaptureFixture[str], argv: list[str]):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: rewrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be at least 1, got 0"),
        ("--batch", "-3", "must be at least 1, got -3"),
        ("--length", "1", "must be at least 2, got 1"),
        ("--lr", "0", "must be a number above 0, got 0"),
        ("--lr", "nan", "must be a number above 0, got nan"),
        ("--steps", "many", "invalid _positive value: 'many'"),
        ("--backend", "fast", "invalid choice: 'fast'"),
    ],
)
def test_finetune_refuses_numbers_out_of_range(
    capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--out", "unused", f"{option}={value}"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_plan_of_the_built_in_model(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--spec", "lora(r=8)@attn.q,v + nf4(base)"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM: lora(r=8)@attn.q,v + nf4(base)\n36 placements, 24,576 trainable")
    assert "model.layers.[0-3].self_attn.q_proj" in out


@pytest.mark.parametrize(
    ("name", "model", "placements"),
    [
        ("llama", "LlamaForCausalLM", 4),
        ("bert", "BertForSequenceClassification", 4),
        ("vit", "ViTForImageClassification", 4),
        ("t5", "T5Model", 12),
        ("bare", "LlamaForCausalLM", 4),
    ],
)
def test_plan_of_a_folder(capsys: pytest.CaptureFixture[str], folder: Folder, name: str, model: str, placements: int):
    assert main(["plan", "--model", folder(name), "--spec", "lora@attn.q,v"]) == 0
    assert capsys.readouterr().out.startswith(f"{model}: lora@attn.q,v\n{placements} placements, ")


def test_plan_makes_no_numbers(capsys: pytest.CaptureFixture[str], folder: Folder):
    # 65 billion parameters: nobody has the memory for them.
    large = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    text = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **large})
    assert main(["plan", "--model", folder("large", text), "--spec", "lora(r=16)@linear-head"]) == 0
    assert "(0.306% of 65,285,660,672)" in capsys.readouterr().out


def test_a_spec_error_has_its_caret(capsys: pytest.CaptureFixture[str]):
    assert failed(capsys, "plan", "--spec", "lorra(r=8)@attn.q") == (
        "rewrite plan: unknown method 'lorra'\n  lorra(r=8)@attn.q\n  ^^^^^ did you mean 'lora'?\n"
    )


@pytest.mark.parametrize("command", ["plan", "diff", "report"])
def test_a_selector_that_matches_nothing(capsys: pytest.CaptureFixture[str], command: str):
    err = failed(capsys, command, "--spec", "lora@cross.q")
    assert err.startswith(f"rewrite {command}: ")
    assert "\n  lora@cross.q\n       ^^^^^^^" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a Hugging Face model folder: it has no config.json"),
        ("{", "cannot read"),
        ("{}", "cannot read"),
        ('{"model_type": "no-such-model"}', "cannot read"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot read"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}', "cannot read"),
        ('{"model_type": "llama", "architectures": ["NoSuchModel"], "vocab_size": -1}', "cannot build a model from"),
    ],
)
def test_folders_that_hold_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    err = failed(capsys, "plan", "--model", str(tmp_path), "--spec", "lora@attn.q")
    assert message in err
    assert str(tmp_path) in err or "configuration" in err


def test_a_folder_that_does_not_exist(capsys: pytest.CaptureFixture[str]):
    err = failed(capsys, "plan", "--model", "no/such/folder", "--spec", "lora@attn.q")
    assert err.startswith("rewrite plan: no such model folder: no/such/folder")


def test_without_transformers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    err = failed(capsys, "plan", "--spec", "lora@attn.q")
    assert err == "rewrite plan: this needs transformers: pip install 'peft-rewrite[hf]'\n"


@pytest.mark.parametrize("name", ["llama", "vit", "t5"])
def test_diff_of_a_folder(capsys: pytest.CaptureFixture[str], folder: Folder, name: str):
    assert main(["diff", "--model", folder(name), "--spec", "lora(r=4)@attn.q,v"]) == 0
    out = capsys.readouterr().out
    assert "@@ insert x" in out
    assert "+++ " in out


@pytest.fixture(scope="module")
def captured() -> nn.Module:
    """The built-in model after `rewrite diff` has captured it."""
    args = argparse.Namespace(model=None, spec="lora(r=4)@attn.q,v", batch=2, length=16)
    return cli._captured(args)


@pytest.fixture
def no_capture(captured: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_captured", lambda args: captured)


@pytest.mark.usefixtures("no_capture")
def test_diff_writes_a_page_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    page, data = tmp_path / "diff.html", tmp_path / "diff.json"
    assert main(["diff", "--spec", "lora(r=4)@attn.q,v", "--html", str(page), "--json", str(data)]) == 0
    assert capsys.readouterr().out == ""
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["spec"] == "lora(r=4)@attn.q,v"
    assert len(found["graphs"]) == 1


def test_report_writes_json_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    data, picture = tmp_path / "report.json", tmp_path / "report.png"
    assert main(["report", "--spec", "lora(r=4)@attn.q,v", "--json", str(data), "--png", str(picture)]) == 0
    assert capsys.readouterr().out == ""
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["spec"] == "lora(r=4)@attn.q,v"
    assert [one["spec"] for one in found["beside"]] == ["full fine-tuning", "lora(r=8)@linear-head"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_capture")
@pytest.mark.parametrize("argv", [["diff", "--html"], ["diff", "--json"], ["report", "--json"]], ids=" ".join)
def test_files_where_nobody_can_write(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str]):
    (tmp_path / "file").touch()
    target = str(tmp_path / "file" / "output")
    err = failed(capsys, argv[0], "--spec", "lora(r=4)@attn.q,v", argv[1], target)
    assert "cannot write " in err
    assert target in err


def test_report_counts_the_batch_that_is_asked_for(capsys: pytest.CaptureFixture[str], folder: Folder):
    argv = ["report", "--model", folder("llama"), "--spec", "lora(r=4)@attn.q,v", "--batch", "3", "--length", "40"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "input_ids=[3, 40]" in out
    assert "saved for backward" in out
    assert "3x40x32" in out
    assert "not counted" not in out


def test_methods_lists_everything_that_is_registered(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name, method in rewrite.methods().items():
        assert f"{name}: {(method.__doc__ or '').splitlines()[0]}" in out
        assert method.paper in out


def test_methods_describes_arguments(capsys: pytest.CaptureFixture[str]):
    assert main(["methods", "lora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in lines if line.startswith("  r ")] == [["r", "8", "an", "int,", "at", "least"]]
    assert any(line.startswith("  init=pissa(niter=none): ") for line in lines)
    assert not any(line.startswith("nf4") for line in lines)


def test_methods_suggests_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert failed(capsys, "methods", "lorra") == "rewrite methods: unknown method 'lorra', did you mean 'lora'?\n"


def test_kernels_prints_a_source(capsys: pytest.CaptureFixture[str]):
    assert main(["kernels", "--source", "nf4_dequantise"]) == 0
    source = capsys.readouterr().out
    compile(source, "generated", "exec")
    assert "@triton.jit\ndef kernel(" in source


@pytest.mark.parametrize("argv", [["nf4_dequantize"], ["--source", "nf4_dequantize"]])
def test_kernels_suggests_the_nearest(capsys: pytest.CaptureFixture[str], argv: list[str]):
    expected = "rewrite kernels: unknown kernel 'nf4_dequantize', did you mean 'nf4_dequantise'?\n"
    assert failed(capsys, "kernels", *argv) == expected


def test_kernels_without_triton(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'triton==" in failed(capsys, "kernels")


def test_kernels_shows_what_was_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pytest.importorskip("triton")
    counted = [aot.Resources(registers=34 + i, spills=8 * i, shared=2048 * i) for i in range(99)]
    monkeypatch.setattr(aot, "compile_all", lambda jobs: iter(counted[: len(jobs)]))
    command = ["kernels", "nf4_dequantise", "--target", "sm_90"]
    assert main(command) == 0
    heading, _, row, *_ = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["kernel", "target", "configs", "registers"]
    count = int(row.split()[2])
    assert row.split()[:9] == f"nf4_dequantise sm_90 {count} 34 / {33 + count} 0 / {8 * count - 8}".split()
    assert main([*command, "--check", "--json", str(tmp_path / "kernels.json")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].endswith("spills 8 bytes of registers")
    records = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert [record["registers"] for record in records] == [34 + i for i in range(count)]


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rewrite, "plan", interrupt)
    assert main(["plan", "--spec", "lora@attn.q"]) == 130
    assert capsys.readouterr().err.endswith("rewrite plan: interrupted\n")


def test_a_reader_that_leaves_early():
    command = [sys.executable, "-m", "rewrite", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_errors_that_are_not_ours_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def bug(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "plan", bug)
    with pytest.raises(ZeroDivisionError):
        main(["plan", "--spec", "lora@attn.q"])


def test_a_long_wait_shows_the_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_DELAY", 0.01)
    monkeypatch.setattr(progress, "_EVERY", {True: 0.01, False: 0.01})
    with progress.waiting("think"):
        time.sleep(0.2)
    assert "think: 00:00" in capsys.readouterr().err


def test_a_short_wait_shows_nothing(capsys: pytest.CaptureFixture[str]):
    with progress.waiting("think"):
        pass
    assert capsys.readouterr().err == ""
