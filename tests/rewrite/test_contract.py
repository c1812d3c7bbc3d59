"""One contract for every registered method, on rectangular odd-sized layers; no method is named here.

Each method is tried with its defaults and with every argument changed on its own, as its dataclass describes them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewrite
from rewrite import inventory, planning
from rewrite.bind import arguments
from rewrite.runtime import attach as attaching
from rewrite.runtime.graft import Graft
from tests.models import assert_close, assert_same, changed, disturb, frozen, gradients, traces
from tests.rewrite.variants import binds, others, variants

SITES: dict[str, tuple[str, ...]] = {
    "linear": ('linear-"mix"', '"mix"'),  # attention reads its weights, it never calls their layers
    "norm": ("norm",),
    "embedding": ("embed",),
    "conv": ("conv",),
    "expert": ('"experts"',),
    "other": ('"gain"',),
}


class Gain(nn.Module):
    """A module of no known kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Experts(nn.Module):
    """Two stacks of matrices, one a group of channels each way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, *size) / 3) for size in ((25, 9), (9, 25)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.stack([F.linear(x, self.up[i]) for i in range(3)])
        return x + (F.gelu(h.flatten(1, -2)) @ self.down.transpose(1, 2)).sum(0).view(x.shape)


class Net(nn.Module):
    """One place of every kind; no two sizes are equal, none is even."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 19)
        self.first = nn.Linear(19, 13, bias=bias)
        self.norm = nn.LayerNorm(13)
        self.conv = nn.Conv1d(13, 15, 3, padding=1, bias=bias)
        self.grouped = nn.ConvTranspose1d(15, 27, 3, padding=1, groups=3, bias=bias)
        self.gain = Gain(27)
        self.second = nn.Linear(27, 9, bias=bias)
        self.experts = Experts()
        self.mix = nn.MultiheadAttention(9, 1, bias=bias, batch_first=True)
        self.third = nn.Linear(9, 11, bias=bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(F.leaky_relu(self.first(self.embed(ids)), 0.4)).transpose(1, 2)
        x = self.second(self.gain(F.gelu(self.grouped(F.gelu(self.conv(x)))).transpose(1, 2)))
        x = self.experts(x)
        return self.third(x + self.mix(x, x, x, need_weights=False)[0])


def build(bias: bool, dtype: torch.dtype = torch.float64) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Net(bias).to(dtype).eval()


@functools.cache
def places(bias: bool, dtype: torch.dtype) -> inventory.Inventory:
    """What the net is made of: found out once, it is what most of the time of attaching goes to."""
    return inventory.take(build(bias, dtype))


@pytest.fixture(autouse=True)
def known_places(monkeypatch: pytest.MonkeyPatch):
    found = {(b, d): places(b, d) for b in (True, False) for d in (torch.float64, torch.bfloat16)}
    monkeypatch.setattr(
        inventory, "take", lambda model, batch=None: found[model.first.bias is not None, model.first.weight.dtype]
    )


def ids(rows: int = 3, tokens: int = 5) -> torch.Tensor:
    return torch.randint(0, 23, (rows, tokens), generator=torch.Generator().manual_seed(8))


def sites(call: str, kinds: frozenset[str]) -> tuple[list[str], dict[str, str]]:
    """The words that a method takes with these arguments, and those that it refuses, with the reason."""
    taken, refused = [], {}
    for word in (word for kind in sorted(kinds & SITES.keys()) for word in SITES[kind]):
        try:
            planning.resolve(places(True, torch.float64), f"{call}@{word}")
            taken.append(word)
        except rewrite.ResolveError as error:
            refused[word] = str(error).splitlines()[0]
    return taken, refused


METHODS = {name: cls for name, cls in rewrite.methods().items() if cls.kinds & SITES.keys()}
"""Those that such a net has a place for; what enters a language model is in `tests/runtime/test_prompts.py`."""
FITTING = {
    f"{name}({args})": sites(f"{name}({args})", cls.kinds)
    for name, cls in METHODS.items()
    for args in variants(cls)
    if binds(f"{name}({args})")
}
SPECS = [f"{call}@{','.join(taken)}" for call, (taken, _) in FITTING.items() if taken]
PLAIN = {next((s for s in SPECS if s.startswith(f"{name}(")), "") for name in METHODS}
"""Each method with its defaults: those go through everything every time, other arguments with `-m slow`."""
BY_VIEW = {METHODS[s.partition("(")[0]]().view(): s for s in sorted(PLAIN - {""}, reverse=True) if "()" in s}.values()
"""One method for each view: how layers are compiled is the view's matter; `test_one_graph.py` compiles every method."""
every_spec = pytest.mark.parametrize("spec", SPECS)
plain_specs = pytest.mark.parametrize(
    "spec", [s if s in PLAIN else pytest.param(s, marks=pytest.mark.slow) for s in SPECS]
)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def attached(spec: str, bias: bool, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(9)
    model = build(bias, dtype)
    assert disturb(rewrite.attach(model, spec)) is model
    return model


def materialised(model: Net, base: Net, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors of the adapted function by the base's names, as differentiable expressions of the adapters."""
    found: dict[str, torch.Tensor] = {
        n: p if dtype is None else p.detach().to(dtype) for n, p in base.named_parameters()
    }
    for graft in sorted(attaching.require(model).grafts, key=lambda g: g.stage):
        module, weight, bias = model.get_submodule(graft.path), f"{graft.path}.{graft.tensor}", f"{graft.path}.bias"
        if graft.where == "train":
            trained = {f"{graft.path}.{name}": module.get_parameter(name) for name in graft.slots}
            found |= {n: t if dtype is None else t.detach().to(dtype) for n, t in trained.items()}
        elif graft.where == "storage":
            held = module.parametrizations[graft.tensor]  # type: ignore[union-attr,index]
            found[weight] = held[0](*(getattr(held, f"original{i}") for i in range(held.ntensors)))
            found[weight] = found[weight] if dtype is None else found[weight].to(dtype)
        elif graft.merged is not None:
            theta = attaching.adapter_of(module, graft).operands()
            theta = theta if dtype is None else tuple(t.to(dtype) if t.is_floating_point() else t for t in theta)
            found[weight], shifted = graft.merged(found[weight], found.get(bias), *theta)
            found |= {} if shifted is None else {bias: shifted}
    return found


Branches = list[tuple[Graft, tuple[torch.Tensor, ...]]]


def branches(model: Net) -> Branches:
    """What no weight can hold: changes of activations without a merged form, each with its tensors."""
    found = [g for g in attaching.require(model).grafts if g.where in ("input", "output") and g.merged is None]
    ordered = sorted(found, key=lambda g: g.stage)
    return [(g, attaching.adapter_of(model.get_submodule(g.path), g).operands()) for g in ordered]


def refuses_to_merge(model: Net) -> bool:
    """Whether `merge` refuses with its reason, as it must where there are branches, and changes nothing."""
    if not branches(model):
        return False
    before = model(ids())
    with pytest.raises(rewrite.RewriteError, match=r"it has no merged weight"):
        rewrite.merge(model)
    assert torch.equal(model(ids()), before)
    return True


def run(base: Net, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, added: Branches) -> torch.Tensor:
    """`base` with other tensors and with branches; a bias that it does not have is registered first."""
    base = copy.deepcopy(base)
    for graft, theta in added:
        assert graft.where == "output"
        assert graft.op is not None
        forward = functools.partial(graft.op, training=False)
        base.get_submodule(graft.path).register_forward_hook(
            lambda module, args, y, forward=forward, theta=theta: forward(args[0], y, *theta)
        )
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        if base.get_submodule(path)._parameters.get(leaf) is None:
            base.get_submodule(path).register_parameter(leaf, nn.Parameter(torch.zeros_like(value)))
    return torch.func.functional_call(base, dict(tensors), (x,))


def test_every_method_and_argument_is_tried():
    for name, cls in METHODS.items():
        tried = [s for s in SPECS if s.startswith(f"{name}(")]
        alone = {a.name for a in arguments(cls) if any(binds(f"{name}({a.name}={v})") for v in others(a))}
        assert all(any(f"{argument}=" in s for s in tried) for argument in alone)
        assert dataclasses.is_dataclass(cls)


def test_what_a_method_refuses():
    for call, (taken, refused) in FITTING.items():
        name, _, args = call.partition("(")
        assert taken or args != ")"
        # Reasons of the place, not of the method.
        derived = (
            "without calling one",
            "reads ids",
            "its rows are several projections in one: name the parts, e.g. attn.q",
        )
        assert args != ")" or all(reason.endswith(derived) for reason in refused.values()), refused
        assert all(re.match(rf"{name} does not fit .+: .+", reason) for reason in refused.values()), refused


@every_spec
def test_the_spec_prints_and_parses_back(spec: str):
    parsed = rewrite.parse(spec)
    assert rewrite.parse(str(parsed)) == parsed
    assert str(rewrite.parse(str(parsed))) == str(parsed)


@with_and_without_bias
@plain_specs
def test_identity_at_step_0(spec: str, bias: bool):
    model, base = build(bias), build(bias)
    placements = rewrite.plan(model, spec).placements
    for placed in placements:
        if placed.method.view() == "storage":  # as near as the format comes
            place = placed.site.place
            weight = base.get_parameter(f"{place.path}.{place.tensor}")
            stored = placed.method.encode(place.map.matrix(weight.detach()).contiguous())
            weight.data = place.map.stored(placed.method.layout(placed.site).decode(*stored), weight.shape)
    rewrite.attach(model, spec)
    if all(p.method.identity for p in placements):
        assert_close(model(ids()), base(ids()), 1e-12)
    else:  # as it says of itself
        assert (model(ids()) - base(ids())).abs().max() > 1e-9


@with_and_without_bias
@every_spec
def test_factored_equals_materialised_with_every_gradient(spec: str, bias: bool):
    model, base = attached(spec, bias), build(bias)
    base.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factored, dense = model(ids()), run(base, materialised(model, base), ids(), branches(model))
    assert_close(factored, dense)
    if not trained:  # storage alone
        assert not factored.requires_grad
        return
    seed = torch.randn(factored.shape, dtype=factored.dtype, generator=torch.Generator().manual_seed(11))
    wanted = torch.autograd.grad(dense, list(trained.values()), seed)
    factored.backward(seed)
    found = gradients(model)
    assert_same(found, dict(zip(trained, wanted, strict=True)))
    assert all(bool(gradient.any()) for gradient in found.values())


@with_and_without_bias
@plain_specs
def test_only_what_the_method_trains_gets_a_gradient(spec: str, bias: bool):
    model = build(bias)
    planned = rewrite.plan(model, spec)
    base = dict(model.named_parameters())
    trained = {f"{p.site.path}.{name}" for p in planned.placements for name, _ in p.trained}
    rewrite.attach(model, spec)
    assert {name for name, p in base.items() if p.requires_grad} == trained
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == planned.trainable


@with_and_without_bias
@every_spec
def test_merged_equals_unmerged_and_is_plain(spec: str, bias: bool):
    model, base = attached(spec, bias), build(bias)
    if refuses_to_merge(model):
        return
    expected = model(ids())
    rewrite.merge(model)
    assert_close(model(ids()), expected)
    assert traces(model) == []
    assert type(model.first) is nn.Linear
    shifts = {name for name in model.state_dict() if name not in base.state_dict()}
    assert all(name.endswith(".bias") for name in shifts)  # of a method that shifts where there was no bias
    assert [n for n in model.state_dict() if n not in shifts] == list(base.state_dict())


@with_and_without_bias
@plain_specs
def test_remove_gives_the_base_back_bit_for_bit(spec: str, bias: bool):
    model, base = attached(spec, bias), build(bias)
    rewrite.remove(model)
    assert changed(frozen(base), frozen(model)) == []
    assert list(model.state_dict()) == list(base.state_dict())
    assert traces(model) == []
    assert all(p.requires_grad for p in model.parameters())


@with_and_without_bias
@plain_specs
def test_saved_and_loaded_is_equal(spec: str, bias: bool, tmp_path: Path):
    model = attached(spec, bias)
    rewrite.save(model, tmp_path)
    onto_base = rewrite.load(build(bias), tmp_path)
    torch.manual_seed(12)
    in_place = rewrite.load(rewrite.attach(build(bias), spec), tmp_path)
    for loaded in (onto_base, in_place):
        assert torch.equal(loaded(ids()), model(ids()))
        assert changed(frozen(loaded), frozen(model)) == []


@pytest.mark.parametrize(
    ("spec", "bias"),
    [
        pytest.param(s, b, id=f"{s}-{b}", marks=() if b and s in BY_VIEW else pytest.mark.slow)
        for s in SPECS
        for b in (True, False)
        if b or s in PLAIN
    ],
)
def test_compiled_equals_eager(spec: str, bias: bool):
    compare_compiled(spec, bias, [(3, 5), (2, 7)])


@pytest.mark.slow  # each of the shapes compiles anew
@plain_specs
def test_compiled_equals_eager_on_one_token_and_an_empty_batch(spec: str):
    compare_compiled(spec, True, [(1, 1), (0, 5)])


def compare_compiled(spec: str, bias: bool, shapes: list[tuple[int, int]]) -> None:
    model = attached(spec, bias)
    rewrite.compile(rewrite.remove(model), spec, backend="eager")
    disturb(model).train()
    trains = any(p.requires_grad for p in model.parameters())

    def outcome(call: Callable[..., torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(13)  # of a dropout
        y = call(x)
        if trains:
            (y * y).sum().backward()
        return y, gradients(model)

    for x in (ids(*shape) for shape in shapes):
        y, found = outcome(model, x)
        expected, wanted = outcome(model.forward, x)
        assert_close(y, expected)
        assert_same(found, wanted)


@with_and_without_bias
@plain_specs
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (1, 7)], ids=["one-token", "empty-batch", "one-row"])
def test_every_shape_of_input(spec: str, bias: bool, shape: tuple[int, int]):
    model, base = attached(spec, bias), build(bias)
    y = model(ids(*shape))
    assert y.shape == (*shape, 11)
    assert_close(y, run(base, materialised(model, base), ids(*shape), branches(model)))


@with_and_without_bias
@plain_specs
def test_bfloat16_base(spec: str, bias: bool):
    model, base = attached(spec, bias, torch.bfloat16), build(bias, torch.bfloat16)
    held = attaching.adapter_state(model).items()
    added = {n: v.dtype for n, v in held if ".adapters." in n and v.is_floating_point()}
    assert set(added.values()) <= {torch.float32}
    assert model(ids()).dtype == torch.bfloat16
    if refuses_to_merge(model):
        return

    expected = materialised(model, base, torch.float64)  # each merged weight is the exact one, rounded once
    rewrite.merge(model)
    assert changed({n: v.to(torch.bfloat16) for n, v in expected.items()}, frozen(model)) == []
