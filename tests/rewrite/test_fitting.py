"""Budget mode: what is added to a spec to fit a memory, in its order, and what is said where nothing fits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.estimate import Estimator, batch_of
from rewrite.fitting import amount
from tests.models import build

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}
SPEC, TOKENS = "lora(r=4)@linear-head", 64


def llama() -> nn.Module:
    return build("llama", torch.bfloat16, **WIDE)


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """The peak of a step with each option, by what is added."""
    model = llama()
    estimator = Estimator(model, batch_of(model, TOKENS, 1))
    found = {}
    for added in ("", " + recompute@ffn", " + nf4(base)", " + nf4(base) + recompute@blocks"):
        estimate = estimator.estimate(SPEC + added)
        state = 2 * sum(h.bytes for h in estimate.held if h.trains)
        found[added] = sum(h.bytes for h in estimate.held) + state + round(estimate.counts.peak)
    return found


@pytest.mark.parametrize("added", ["", " + recompute@ffn", " + nf4(base)"])
def test_the_first_that_fits_is_taken(peaks: dict[str, int], caplog: pytest.LogCaptureFixture, added: str):
    with caplog.at_level(logging.WARNING, logger="rewrite"):
        model = rewrite.compile(llama(), SPEC, backend="eager", memory=peaks[added], tokens=TOKENS)
    text = str(rewrite.explain(model))
    assert text.splitlines()[0].endswith(SPEC + added)
    (message,) = [r.message for r in caplog.records if "memory=" in r.message]
    assert message in text
    assert (f"{added.strip(' +')} added" in message) is bool(added)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_nothing_fits(peaks: dict[str, int]):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        rewrite.RewriteError, match=r"not fit 100KB: the smallest found takes [\d.]+ [KM]iB, with 'lora"
    ):
        rewrite.compile(model, SPEC, memory="100KB", tokens=TOKENS)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert min(peaks.values()) > amount("100KB")


def test_what_the_spec_decides_stays(peaks: dict[str, int]):
    with pytest.raises(rewrite.RewriteError) as error:
        rewrite.compile(llama(), f"{SPEC} + save(int8)", memory="100KB", tokens=TOKENS)
    assert "recompute" not in str(error.value)
    with pytest.raises(rewrite.RewriteError) as error:
        rewrite.compile(llama(), "full(linear)", memory="100KB", tokens=TOKENS)
    assert "nf4" not in str(error.value)


def test_a_batch_must_be_said():
    with pytest.raises(rewrite.RewriteError, match="say how many tokens"):
        rewrite.compile(llama(), SPEC, memory="1GiB")


@pytest.mark.parametrize("text", ["", "12", "12 GiB", "1.5KiB", "2GB", 7])
def test_amounts(text: str | int):
    known = {"12": 12, "12 GiB": 12 * 2**30, "1.5KiB": 1536, "2GB": 2 * 10**9, 7: 7}
    if text in known:
        assert amount(text) == known[text]
    else:
        with pytest.raises(rewrite.RewriteError, match="memory is an amount such as '12GiB'"):
            amount(text)
