"""The zoo: every architecture that transformers ships, small, against what a base model does by itself.

CI runs a sample that holds every layout once; `pytest -m slow tests/zoo` runs all of them (about an hour).
"""

from __future__ import annotations

import pytest

from tests.zoo.build import KINDS, Case, cases
from tests.zoo.check import check, quiet

SAMPLE = {
    "causal": (
        *("falcon", "phi3"),  # fused projections: interleaved by group, in a row
        *("gpt_oss", "llama4_text"),  # experts stored either way
        *("mamba", "qwen3_next"),  # no attention, and some
    ),
    "encoder": ("deberta-v2",),
    "encoder-decoder": ("bart",),
    "vision": ("beit", "convnext"),
    "audio": ("whisper",),
    "multimodal": ("clip",),
}
EVERY = {kind: cases(kind) for kind in KINDS}


def sampled(case: Case) -> bool:
    return case.name in SAMPLE.get(case.kind, ())


def parameters() -> list:
    found = []
    for case in (case for kind in EVERY.values() for case in kind):
        marks = [] if sampled(case) else [pytest.mark.slow]
        found.append(pytest.param(case, id=f"{case.kind}-{case.name}", marks=marks))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", parameters())
def test_architecture(case: Case):
    if case.skip:
        pytest.skip(case.skip)
    quiet()
    result = check(case)
    assert not result.failures, "\n".join(result.failures)


def test_the_sample_is_in_the_zoo():
    names = {kind: {case.name for case in found if not case.skip} for kind, found in EVERY.items()}
    assert not [name for kind, sample in SAMPLE.items() for name in sample if name not in names[kind]]


def test_every_skip_has_a_reason():
    assert all(case.skip is None or len(case.skip) > 10 for found in EVERY.values() for case in found)
