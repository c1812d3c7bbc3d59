"""C++ for a CPU: compiled at first use, once for all processes, and every way there is none."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rewrite
from rewrite.codegen import storage
from rewrite.codegen.cpu import build, operators
from rewrite.codegen.cpu import nf4 as cpu_nf4
from tests.codegen.test_cpu_nf4 import packed, pytestmark, reference, stored

__all__ = ["pytestmark"]
ROOT = Path(__file__).parents[2]


def test_switched_off(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    parts = stored((5, 70))
    assert cpu_nf4.unreadable(parts) == "REWRITE_CPU_KERNELS=0"
    assert cpu_nf4.decoded(parts, (5, 70), torch.float32, 64) is None
    model = rewrite.attach(torch.nn.Sequential(torch.nn.Linear(70, 5)), "nf4(linear)")
    x = torch.randn(3, 70)
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert "nf4 on the CPU: PyTorch operators, no C++ kernels: REWRITE_CPU_KERNELS=0" in rewrite.explain(model)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache with nothing in it, and kernels that were not asked for before.

    The operators stay those of the process, loaded before anything changes: they can only be defined once.
    """
    assert operators.kernels().library() is not None
    monkeypatch.setenv("REWRITE_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)  # of the machine, or of a library that compiled before
    forget(monkeypatch)
    return tmp_path / "cpu"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be as if they had not been asked for."""
    anew = build.Build(cpu_nf4._SOURCE, build.instruction_sets()[0])
    monkeypatch.setattr(cpu_nf4, "kernels", lambda target=None: anew)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def model_and_text() -> tuple[torch.Tensor, str]:
    model = rewrite.attach(torch.nn.Sequential(torch.nn.Linear(70, 5)), "nf4(linear)")
    return model(torch.ones(3, 70)), re.search(r"nf4 on the CPU: (.*)", rewrite.explain(model)).group(1)


def test_nothing_is_compiled_before_the_first_product(fresh: Path):
    model = rewrite.attach(torch.nn.Sequential(torch.nn.Linear(70, 5)), "nf4(linear)")
    assert rewrite.explain(model).count("compiled at the first use") == 1
    assert not fresh.exists()
    model(torch.ones(1, 70))
    assert len(list(fresh.glob("nf4-*.so"))) == 1
    assert "compiled at" not in rewrite.explain(model)


def test_another_header_or_flag_is_another_library(tmp_path: Path):
    for name in ("nf4.cpp", "other.h"):
        (tmp_path / name).write_text("// one")
    command = (sys.executable, "-O3")
    first = build._digest(tmp_path / "nf4.cpp", command)
    assert build._digest(tmp_path / "nf4.cpp", command) == first
    assert build._digest(tmp_path / "nf4.cpp", (*command, "-g")) != first
    (tmp_path / "other.h").write_text("// two")
    assert build._digest(tmp_path / "nf4.cpp", command) != first


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not a program"),
        ({"CXX": "false"}, r"\S*/false failed \(1\): no message"),
        ({"PATH": ""}, "no C\\+\\+ compiler; install one, or set CXX to it"),
    ],
    ids=["missing", "broken", "none"],
)
def test_falls_back_and_says_why(fresh: Path, monkeypatch, environment, reason):
    expected, _ = model_and_text()
    forget(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    found, text = model_and_text()
    assert found.shape == expected.shape
    assert re.fullmatch(f"PyTorch operators, no C\\+\\+ kernels: {reason}", text)


def test_a_compiler_that_refuses_openmp(fresh: Path, monkeypatch, tmp_path: Path):
    refusal = 'case "$*" in *-fopenmp*) echo "error: no OpenMP" >&2; exit 1;; esac'
    wrapper = script(tmp_path / "plain-c++", f'{refusal}\nexec {shutil.which("c++")} "$@"')
    monkeypatch.setenv("CXX", str(wrapper))
    parts = stored((65, 70))
    assert torch.equal(packed(parts, (65, 70), torch.bfloat16).decode(), reference(parts, (65, 70), torch.bfloat16))
    assert cpu_nf4.route().endswith("one thread: the compiler has no OpenMP")


def test_two_processes_compile_once(fresh: Path, tmp_path: Path):
    log = tmp_path / "calls"
    wrapper = script(tmp_path / "slow-c++", f'echo call >> {log}\nsleep 2\nexec {shutil.which("c++")} "$@"')
    code = """
from rewrite.codegen.cpu import nf4
found = nf4.kernels()
assert found.library() is not None, found.failure
"""
    environment = {**os.environ, "CXX": str(wrapper), "REWRITE_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert log.read_text() == "call\n"
    assert sorted(told) == ["", "rewrite: compiling nf4.cpp for this CPU, once ...\n"]  # told by the one that compiles
    assert len(list(fresh.glob("nf4-*.so"))) == 1


@pytest.mark.parametrize("module", [build, cpu_nf4, storage])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
