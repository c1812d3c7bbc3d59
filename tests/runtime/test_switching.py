"""Named adapters: switched, weighted, and chosen by rows, without another graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime.captures import records_of
from tests.models import assert_close, disturb


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 21), nn.Linear(21, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def build() -> Net:
    torch.manual_seed(3)
    return Net().double().eval()


def inputs(rows: int = 4, tokens: int = 5) -> torch.Tensor:
    return torch.randn(rows, tokens, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def pair(method: str, **compile: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A model with two adapters, and one model for each of them alone with the same values."""
    torch.manual_seed(9)
    both = disturb(rewrite.attach(build(), f"en: {method}@linear + fr: {method}@linear"))
    alone = {}
    for name in ("en", "fr"):
        one = alone[name] = rewrite.attach(build(), f"{name}: {method}@linear")
        values = dict(both.named_parameters())
        for key, tensor in one.named_parameters():
            if "adapters" in key or "parametrizations" in key:
                tensor.data.copy_(_matching(values, key, name, list(alone).index(name)))
    return both, alone


def _matching(values, key, name, number):
    # a parametrisation goes by its place in a list, an adapter by its name
    return values[key] if number == 0 or f".{name}." in key else values[key.replace(".0.", f".{number}.")]


@pytest.mark.parametrize("method", ["lora(r=3)", "ia3", "lora(r=2, bias=true)"])
def test_the_one_in_use_is_as_if_alone(method):
    both, alone = pair(method)
    for name in ("en", "fr", "en"):
        assert rewrite.use(both, name) is both
        assert_close(both(inputs()), alone[name](inputs()))
    assert_close(rewrite.use(both, None)(inputs()), build()(inputs()))
    assert rewrite.in_use(both) == {"en": 0.0, "fr": 0.0}


def test_weights_scale_updates():
    both, _ = pair("lora(r=3)")
    with torch.no_grad():
        both.second.requires_grad_(False)
        rewrite.use(both, {"en": 0.7, "fr": 0.3})
        merged = rewrite.merge(copy.deepcopy(both))
        assert_close(both(inputs()), merged(inputs()))
        updates = {}
        for name in ("en", "fr"):
            one = rewrite.merge(copy.deepcopy(rewrite.use(both, name)))
            updates[name] = one.first.weight - build().first.weight
    assert_close(merged.first.weight, build().first.weight + 0.7 * updates["en"] + 0.3 * updates["fr"])


@pytest.mark.parametrize("method", ["lora(r=3)", "dora(r=3)", "ia3", "lora(r=2, bias=true)"])
def test_rows_use_different_adapters(method):
    torch.manual_seed(9)
    spec = (
        f"en: {method}@first + fr: {method}@second"
        if "dora" in method
        else f"en: {method}@linear + fr: {method}@linear"
    )
    spec = spec.replace("@first", '@"first"').replace("@second", '@"second"')
    model = disturb(rewrite.attach(build(), spec))
    expected = []
    for row, choice in enumerate(["en", None, {"en": 0.5, "fr": 2.0}, "fr"]):
        expected.append(rewrite.use(model, choice)(inputs())[row])
    rewrite.use(model, per_row=["en", None, {"en": 0.5, "fr": 2.0}, "fr"])
    assert_close(model(inputs()), torch.stack(expected))
    with pytest.raises(rewrite.RewriteError, match="rows"):
        rewrite.merge(model)


def test_a_weight_itself_cannot_differ_by_rows():
    model = rewrite.attach(build(), "en: dora(r=2)@linear + fr: dora(r=2)@linear")
    with pytest.raises(rewrite.RewriteError, match="rewrites the weight itself"):
        rewrite.use(model, per_row=["en", "fr"])


def test_cycling_twelve_adapters_and_five_scales_captures_nothing_new():
    names = [f"a{i}" for i in range(12)]
    spec = " + ".join(f"{n}: lora(r={1 + i % 3})@linear" for i, n in enumerate(names))
    torch.manual_seed(9)
    model = disturb(rewrite.compile(build(), spec, backend="eager"))
    with torch.no_grad():
        rewrite.use(model, names[0])(inputs())
        graphs = len(records_of(model))
        for scale in (0.1, 0.5, 1.0, 1.5, 2.0):
            for name in names:
                rewrite.use(model, {name: scale})
                assert_close(model(inputs()), model.forward(inputs()))
        rewrite.use(model, None)
        assert_close(model(inputs()), build()(inputs()))
    assert len(records_of(model)) == graphs == 1


def test_inactive_adapters_get_zero_gradients():
    both, _ = pair("lora(r=3)")
    rewrite.use(both, "fr")(inputs()).sum().backward()
    for name, p in both.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert bool(p.grad.any()) == (".fr." in name)
    groups = rewrite.parameter_groups(both, lr=1e-3, adapter="fr")
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for n, p in both.named_parameters() if ".fr." in n}


def test_errors():
    both, _ = pair("lora(r=3)")
    with pytest.raises(rewrite.RewriteError, match="no adapter 'enn': did you mean 'en'"):
        rewrite.use(both, "enn")
    with pytest.raises(rewrite.RewriteError, match="not both"):
        rewrite.use(both, "en", per_row=["fr"])
    with pytest.raises(rewrite.RewriteError, match="has no name"):
        rewrite.use(rewrite.attach(build(), "lora(r=2)@linear"), None)


def test_copies_and_files_keep_their_own(tmp_path):
    both, alone = pair("lora(r=3)")
    other = copy.deepcopy(both)
    rewrite.use(other, "fr")
    rewrite.use(both, "en")
    assert_close(other(inputs()), alone["fr"](inputs()))
    assert_close(both(inputs()), alone["en"](inputs()))
    rewrite.save(both, tmp_path)
    loaded = rewrite.use(rewrite.load(build(), tmp_path), "fr")
    assert_close(loaded(inputs()), alone["fr"](inputs()))
