"""Every benchmark runs at a tiny size and writes what docs/benchmarks.md says; gpu.sh ends within its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--shrink", "64", "--tokens", "3", "--rounds", "2", "--case-seconds", "0.1"]
EAGER = ["rewrite", "base"]


def run(script: str, *arguments: str, out: Path) -> dict[str, Any]:
    """The result of a script that must succeed."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *TINY, *arguments, "--out", str(out), "--name", "r"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, text=True)
    assert (out / "r.png").stat().st_size > 1000
    return json.loads((out / "r.json").read_text())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def assert_result(result: dict[str, Any], failing: set[str]) -> None:
    """Ours was timed, checked and compared; who failed says why, and nobody else did."""
    rows = result["rows"]
    assert {name for name, row in rows.items() if "failure" in row} == failing
    for name, row in rows.items():
        if name in failing:
            assert ": " in row["failure"]
            continue
        assert row["passed"]
        assert 0 <= max(row["check"].values()) <= result["bound"]
        assert row["times"]["step"]["low"] <= row["times"]["step"]["median"] <= row["times"]["step"]["high"]
        assert row["saved_bytes"] >= 0
    compared = result["ratios"]["step"]["over ours"]
    assert compared.keys() == rows.keys() - failing - {"rewrite"}
    assert all(len(ratio["pairs"]) == 2 for ratio in compared.values())


def test_linears(tmp_path: Path):
    data = run(
        "linears.py", "--methods", "lora", "--shapes", "layer", "--ranks", "4", "--dtype", "float32",
        "--backend", "aot_eager",
        "--without", "peft, compiled", "base, compiled", out=tmp_path,
    )  # fmt: skip
    (result,) = data["results"]
    assert result["case"] == {
        "method": "lora", "shape": "layer", "tokens": 3, "rank": 4, "dtype": "float32", "linears": 7,
    }  # fmt: skip
    assert_result(result, {"unsloth"})
    assert result["rows"]["base"]["saved_bytes"] == 0 < result["rows"]["rewrite"]["saved_bytes"]
    assert data["about"]["versions"]["torch"]


def test_steps(tmp_path: Path):
    data = run(
        "steps.py", "--models", "layer", "--methods", "lora", "--dtype", "float32", "--backend", "aot_eager",
        "--peers", "unsloth's path", "peft + liger", "base", out=tmp_path,
    )  # fmt: skip
    (result,) = data["results"]
    assert result["case"]["model"] == "layer"
    assert_result(result, {"peft + liger"})


def test_nf4_cpu(tmp_path: Path):
    data = run(
        "nf4_cpu.py", "--model-tokens", "3", "--rank", "4", "--dtype", "float32", "--backend", "aot_eager",
        "--peers", "base", out=tmp_path,
    )  # fmt: skip
    layer, model = data["results"]
    assert layer["case"]["shape"] == "q,o"
    assert model["case"]["model"] == "small"
    for result in (layer, model):
        assert_result(result, set())
    assert data["nf4 on the CPU"]


def test_a_layer_more_costs_what_the_second_of_two_added(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from steps import counted  # type: ignore[import-not-found]

    def result(model: str, seconds: float, kept: int) -> dict[str, Any]:
        case = {"method": "lora", "tokens": 8192, "rank": 16, "dtype": "bfloat16", "model": model}
        rows = {"rewrite": {"times": {"step": {"median": seconds}}, "saved_bytes": kept}, "peft": {"failure": "no"}}
        return {"case": case, "rows": rows}

    (found,) = counted([result("layer", 3.0, 70), result("layers", 5.0, 110)])
    assert found["rows"] == {"rewrite": {"seconds": 3.0 + 31 * 2.0, "saved_bytes": 70 + 31 * 40}}
    assert counted([result("layer", 3.0, 70)]) == []


def test_rounds_are_interleaved_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import harness  # type: ignore[import-not-found]

    order: list[str] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(harness, "SAMPLE", 0.0)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    steps = {name: lambda _, name=name: order.append(name) for name in "abc"}
    times = harness.measure(steps, torch.device("cpu"), harness.Plan(rounds=3, warmup=0))
    assert "".join(order[3:]) == "abcbcacab"
    ratios = harness.ratios({**times, "b": [2.0, 3.0, 5.0]}, "a")
    assert ratios["b"]["pairs"] == [2.0, 3.0, 5.0]
    assert ratios["b"]["median"] == 3.0


def test_who_measures_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from harness import Gate  # type: ignore[import-not-found]

    lock = tmp_path / "lock"
    try_it = f"flock --nonblock --{{}} {lock} true"
    with Gate(str(lock)).preparing():
        assert subprocess.run(try_it.format("shared").split(), check=False).returncode == 0
        assert subprocess.run(try_it.format("exclusive").split(), check=False).returncode != 0
    with Gate(str(lock)).measuring():
        assert subprocess.run(try_it.format("shared").split(), check=False).returncode != 0


def test_operators(tmp_path: Path):
    data = run("operators.py", "--dtype", "bfloat16", out=tmp_path)
    assert {r["case"]["operation"].rpartition(" ")[0] for r in data["results"]} >= {"nf4 decode", "nf4 dy W 3 tokens"}
    for result in data["results"]:
        assert all(row["passed"] and row["seconds"]["median"] > 0 for row in result["rows"].values())


@pytest.mark.parametrize("budget", [12])
def test_gpu_script_stops_within_its_budget_and_keeps_what_there_is(tmp_path: Path, budget: int):
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    arguments = [str(tmp_path), "--dry", "--budget", str(budget), "--parts", "others", "operators"]
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", str(script), *arguments],
        env={**environment(), "PYTHON": sys.executable}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert time.monotonic() - begin < budget + 5
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert set(data["parts"]) <= {"others", "operators"}
    assert {p["state"].split()[0] for p in data["parts"].values()} <= {"done", "stopped"}
    assert "not measured" in done.stdout
    assert len(list(tmp_path.iterdir())) <= 8
