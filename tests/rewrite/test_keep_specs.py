"""Clauses about what a step keeps: spelling, `~` where something is approximate and only there, errors with a caret."""

from __future__ import annotations

import pytest
import torch

import rewrite
from tests.runtime.test_keeping import Net

SPELLINGS = {
    "lora@attn.q,v+save( fp8 )": "lora@attn.q,v + save(fp8)",
    "lora@ffn + save(codec=int8, group=64)@ffn": "lora@ffn + save(int8, group=64)@ffn",
    "lora@ffn + save(group=64,codec=int8)@linear,norm": "lora@ffn + save(int8, group=64)@linear,norm",
    "lora@ffn + ~save(int4)@ffn[0] + save": "lora@ffn + ~save(int4)@ffn[0] + save",
    "lora@ffn + save(bit1)": "lora@ffn + save(bit1)",
    "lora@ffn + ~save(bit1)@ffn": "lora@ffn + ~save(bit1)@ffn",
    "lora@ffn + recompute@ffn,attn + budget(0.25)": "lora@ffn + recompute@ffn,attn + budget(0.25)",
    "lora@ffn + budget(fraction=1) + recompute": "lora@ffn + budget(1) + recompute",
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_canonical_spelling(text: str):
    spec = rewrite.parse(text)
    assert str(spec) == SPELLINGS[text]
    assert rewrite.parse(str(spec)) == spec
    planned = rewrite.plan(Net(), text)
    assert planned.spec == SPELLINGS[text]
    again = rewrite.plan(Net(), str(spec))
    assert [(p.method, p.sites) for p in planned.policies] == [(p.method, p.sites) for p in again.policies]
    assert {p.method.name for p in planned.policies} == {c.call.name for c in spec} - {"lora"}
    words = {str(value) for clause in spec for value in clause.call.args}
    assert words <= {"fp8", "int8", "int4", "bit1", "0.25", "1"}


ERRORS = {
    "save(fp9)": ("save(codec) wants one of fp8, int8, int4, bit1, got 'fp9'", "fp9", "did you mean 'fp8'?"),
    "save(int4)": ("save(int4) is approximate: nonlinearities keep", "save(int4)", "write ~save(int4)"),
    "~save(fp8)@ffn": ("save(fp8) needs no '~': nothing about it is approximate", "save(fp8)", "write save(fp8)@ffn"),
    "~recompute@ffn": ("recompute needs no '~'", "recompute", "write recompute@ffn"),
    "~lora@ffn": ("lora needs no '~'", "lora", "write lora@ffn"),
    "save(fp8, int8)": ("save takes one value, sites stand after '@'", "int8", ""),
    "save(fp8, codec=int8)": ("argument 'codec' is written twice", "fp8", ""),
    "save(attn.q)@ffn": ("sites are written twice", "@", ""),
    "save(fp8[0])": ("save(codec) wants one of", "fp8[0]", ""),
    "save(fp8, group=4)@ffn": ("save(group) must be at least 8, got 4", "4", ""),
    "~save(int4, group=64)": ("save: derivatives have no groups", "save(int4, group=64)", ""),
    "budget(1.5)": ("budget(fraction) must be at most 1, got 1.5", "1.5", ""),
    "budget(0.5)@ffn": ("budget is about the whole model, not about sites", "ffn", "write budget(0.5)"),
    "x: save(fp8)": ("save is no adapter: it cannot be called 'x'", "x: save(fp8)", "write save(fp8)"),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_point_at_what_is_wrong(text: str):
    message, marked, hint = ERRORS[text]
    with pytest.raises(rewrite.SpecError) as error:
        rewrite.parse(text)
    first, line, caret, *_ = str(error.value).splitlines()
    assert message in first
    assert hint in caret
    start, width = len(caret) - len(caret.lstrip()), caret.count("^")
    assert line[start : start + width] == marked


CONFLICTS = {
    "full + save(fp8) + save(int8)": "'save(int8)' and 'save(fp8)' are both about the whole model",
    "full + save(fp8)@ffn + save(int8)@ffn.up": "'save(int8)@ffn.up' and 'save(fp8)@ffn' are both about blocks.0.mlp",
    "full + budget(0.5) + budget(0.2)": "'budget(0.2)' and 'budget(0.5)' are both about the whole model",
}


@pytest.mark.parametrize("text", CONFLICTS)
def test_what_is_said_twice_is_an_error(text: str):
    with pytest.raises(rewrite.ResolveError, match=r"are both about") as error:
        rewrite.plan(Net(), text.replace("full", "full(linear)"))
    assert CONFLICTS[text] in str(error.value)


def test_an_exported_program_saves_nothing():
    program = torch.export.export(Net(), (torch.zeros(1, 3, dtype=torch.long),))
    with pytest.raises(rewrite.RewriteError, match="is no training step"):
        rewrite.apply(program, "lora@ffn + save(fp8)")
