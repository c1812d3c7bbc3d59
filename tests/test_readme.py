"""The README is true: its Python runs and prints what it shows, its commands and links exist."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# A block of Python, and the text block right behind it, which is what the Python prints.
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^ *(?:\$ )?(rewrite [a-z].*)$", TEXT, re.MULTILINE)


def test_the_blocks_are_found():
    assert len(BLOCKS) == TEXT.count("```python\n") > 1
    assert sum(bool(shown) for _, shown in BLOCKS) == TEXT.count("```text\n") > 1
    assert len(COMMANDS) >= 4


def test_python_prints_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    checker = doctest.OutputChecker()
    for code, shown in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        got, example = printed.getvalue(), doctest.Example(code, shown)
        # `...` stands for what the README leaves out.
        if not checker.check_output(example.want, got, doctest.ELLIPSIS):
            pytest.fail(checker.output_difference(example, got, doctest.ELLIPSIS))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str):
    program, *argv = shlex.split(command)
    args = cli._parser().parse_args(argv)
    assert program == "rewrite"
    rewrite.parse(getattr(args, "spec", None) or "lora@linear")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+)", TEXT))))
def test_make_targets_exist(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?://)([^)#]+)", TEXT))))
def test_links_lead_somewhere(link: str):
    assert (ROOT / link).exists()


def test_every_method_is_named():
    assert all(f"`{name}" in TEXT for name in rewrite.methods())


def test_the_two_commands_come_first():
    opening, *_ = TEXT.partition("\n## ")
    assert [line.strip() for line in opening.splitlines() if line.startswith("    make")] == ["make demo", "make test"]
