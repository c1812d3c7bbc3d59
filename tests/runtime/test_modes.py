"""Inductor's modes: `reduce-overhead` asks for CUDA graphs forward and backward, and copies no parameter into them."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch._inductor import compile_fx, config

import rewrite
from rewrite.codegen.kernels import plans, tune
from rewrite.passes.partition import Partitioner
from rewrite.passes.record import GraphRecord
from rewrite.runtime.compiled import settings
from tests.models import ONE_LAYER, SPECS, assert_same, batch, build, disturb, step

MODE = "reduce-overhead"


class Compiles:
    """Stands in for Inductor's compile of one graph: notes what it was asked, and runs the graph as it is."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any, **asked: Any) -> Callable[..., Any]:
        self.asked.append({**asked, "inputs": len(list(example_inputs)), "graphs": config.triton.cudagraphs})
        return make_boxed_func(gm.forward)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Compiles:
    found = Compiles()
    defaults = list(compile_fx.compile_fx.__defaults__ or ())
    defaults[0] = found
    monkeypatch.setattr(compile_fx.compile_fx, "__defaults__", tuple(defaults))
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_both_graphs_of_a_step_are_asked_for_as_cuda_graphs(compiles: Compiles, dynamic: bool):
    model = build("llama", **ONE_LAYER["llama"])
    rewrite.compile(model, "lora(r=4)@linear-head", mode=MODE, dynamic=dynamic)
    step(model, model, batch("llama"))
    forward, backward = compiles.asked
    assert forward["graphs"]
    assert backward["graphs"]
    assert not config.triton.cudagraphs  # for our graphs alone


def test_parameters_are_read_where_they_are(compiles: Compiles):
    model = build("llama", **ONE_LAYER["llama"])
    rewrite.compile(model, SPECS["lora+nf4"], mode=MODE, dynamic=False)
    step(model, model, batch("llama"))
    forward = compiles.asked[0]
    moving = forward["inputs"] - len(list(forward["static_input_idxs"]))
    assert moving <= len(batch("llama"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_mode_changes_no_number_on_a_cpu(backend: str):
    found = []
    for mode in (None, MODE):
        torch.manual_seed(0)
        model = rewrite.compile(build("small"), "lora(r=4)@linear", backend=backend, mode=mode, dynamic=False)
        found.append(step(model, disturb(model, seed=1), batch("small")))
    assert_same(found[0][1], found[1][1])


def test_max_autotune_asks_for_timed_kernels(compiles: Compiles, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "_asked", False)
    monkeypatch.delenv("REWRITE_AUTOTUNE", raising=False)
    plans.forget()  # it is read once
    for mode, timed in (("default", False), ("max-autotune-no-cudagraphs", True)):
        model = rewrite.compile(build("small"), "lora(r=4)@linear", mode=mode, dynamic=False)
        step(model, model, batch("small"))
        assert tune.wanted() == timed
    monkeypatch.setenv("REWRITE_AUTOTUNE", "0")
    plans.forget()
    assert not tune.wanted()  # it has the last word
    monkeypatch.undo()
    plans.forget()


def test_an_unknown_mode_is_an_error_that_names_the_choices():
    model = build("llama", **ONE_LAYER["llama"])
    with pytest.raises(rewrite.RewriteError, match="unknown mode 'fast': choose one of default, reduce-overhead"):
        rewrite.compile(model, "lora@attn.q", mode="fast")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["lora(r=4)@linear-head", SPECS["lora+nf4"]])
def test_replayed_graphs_compute_what_eager_computes(spec: str):
    model = build("llama", **ONE_LAYER["llama"]).cuda()
    disturb(rewrite.compile(model, spec, mode=MODE, dynamic=False), seed=1)
    inputs = {name: value.cuda() for name, value in batch("llama").items()}
    for _ in range(4):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        found = step(model, model, inputs)
        expected = step(model, model.forward, inputs)
        torch.testing.assert_close(found[0].loss, expected[0].loss)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(model(**inputs).logits, model.forward(**inputs).logits)


def test_our_settings_can_be_logged_and_be_part_of_a_key():
    # As PyTorch 2.11 does with every compilation: sets sorted, all of it as JSON; and pickled, for Inductor's cache.
    ignored = settings()["ignore_logging_functions"]
    json.dumps({"ignored": sorted(ignored) if isinstance(ignored, set) else ignored})
    assert logging.Logger.warning in ignored
    assert any(fn is logging.Logger.info for fn in ignored)
    first, second = (pickle.dumps(Partitioner(GraphRecord(title=title, training=True))) for title in ("a", "b"))
    assert first == second
