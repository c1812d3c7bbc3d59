"""Dropout by a counter: the generator against published numbers, masks as statistics, operators against plain ones."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rewrite
from rewrite.codegen import masks
from rewrite.codegen.cpu import build, operators

OPS = torch.ops.rewrite
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
# of Random123's kat_vectors
KNOWN = [
    (7, [0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, *PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, [0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SHAPES = [(4, 19), (2, 3, 19), (1, 19), (0, 19), (19,), (3, 1), (2, 8)]


def seeds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_numbers(rounds, counter, key, words):
    found = masks.philox([torch.tensor(c) for c in counter], key, rounds)
    assert [f"{int(w):08x}" for w in found] == words.split()


def test_the_definition_element_by_element():
    """Python's own integers, one element at a time, against the mask."""

    def words(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(7):
            a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [b >> 32 ^ counter[1] ^ key[0], b % 2**32, a >> 32 ^ counter[3] ^ key[1], a % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return counter

    for seed, p in itertools.product((0, 5, 2**40 + 3, 2**63 - 2), (0.05, 0.5)):
        mask = masks.kept(3, 19, seeds(seed), p)
        for row, column in itertools.product(range(3), range(19)):
            word = words([column // 8, row, 0, 0], [seed % 2**32, seed // 2**32])[column % 8 // 2]
            number = word >> 16 if column % 2 else word % 2**16
            assert bool(mask[row, column]) == (number >= round(p * 2**16))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_rate(p):
    count = 512 * 1024
    found = masks.kept(512, 1024, seeds(12345), p)
    drops = count - int(found.sum())
    assert abs(drops - p * count) < 5 * (p * (1 - p) * count) ** 0.5
    # by row and by column, too: as many deviate as chance has it
    for dim, n in ((0, 512), (1, 1024)):
        z = ((~found).double().sum(dim) - p * n) / (p * (1 - p) * n) ** 0.5
        assert abs(float(z.square().mean()) - 1) < 0.25


def test_p_is_a_multiple_of_two_to_the_minus_16_and_the_mean_is_exact():
    for p in (1e-7, 0.05, 1 / 3, 0.999999):
        dropped = masks.threshold(p) / 2**16
        assert abs(dropped - p) <= 2**-16
        assert masks.scale(p) * (1 - dropped) == pytest.approx(1.0, rel=1e-15)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two masks, in standard deviations of what chance gives."""
    x = torch.stack([a.flatten(), b.flatten()]).double()
    return float(torch.corrcoef(x)[0, 1]) * x.shape[1] ** 0.5


def test_masks_are_independent():
    """Neighbouring columns (those of one call among them), rows, sites and steps."""
    p, mask = 0.3, masks.kept(256, 1024, seeds(7), 0.3)
    pairs = [(mask[:, :-lag], mask[:, lag:]) for lag in (1, 2, 3, 4, 7, 8, 16, 64)]
    pairs += [(mask[:-lag], mask[lag:]) for lag in (1, 2, 8, 128)]
    # seeds that differ in a bit, low or high, as the worst that a generator could give to two sites or steps
    pairs += [(mask, masks.kept(256, 1024, seeds(7 ^ 1 << bit), p)) for bit in (0, 1, 31, 32, 62)]
    for i, j in itertools.combinations(range(8), 2):
        pairs.append((mask[:, i::8], mask[:, j::8]))
    worst = [abs(correlation(a, b)) for a, b in pairs]
    assert max(worst) < 4.5, worst


def test_draws_follow_the_generator():
    x = torch.ones(2)
    torch.manual_seed(3)
    first = [OPS.draw(x) for _ in range(3)]
    torch.manual_seed(3)
    again = [OPS.draw(x) for _ in range(3)]
    assert first == again
    assert len({int(s) for s in first}) == 3
    assert all(s.dtype == torch.int64 and s.shape == (1,) and int(s) > 2**32 for s in first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_is_its_mask_and_keeps_the_seed_alone(shape):
    x, seed, p = leaf(*shape), seeds(99), 0.4
    y = OPS.dropout(x, seed, p)
    rows = x.detach().reshape(x.shape[:-1].numel(), shape[-1])
    mask = masks.kept(*rows.shape, seed, p).view(shape).double() * masks.scale(p)
    torch.testing.assert_close(y, x * mask, rtol=0, atol=0)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy * mask, rtol=0, atol=0)
    assert [t.data_ptr() for t in kept_by(lambda: OPS.dropout(x, seed, p))] == [seed.data_ptr()]


def kept_by(call) -> list[Tensor]:
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
        call()
    return found


GROUPS = {"one": ([3], [0.4]), "three": ([2, 3, 1], [0.4, 0.1, 0.7])}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropped_linear_equals_plain_operators(shape, group):
    ranks, p = group
    x, A, seed = leaf(*shape), leaf(sum(ranks), shape[-1]), seeds(*range(50, 50 + len(ranks)))
    fused = OPS.dropped_linear(x, A, seed, ranks, p)
    parts = zip(A.split(ranks), seed.split(1), p, strict=True)
    plain = torch.cat([F.linear(OPS.dropout(x, s, pi), Ai) for Ai, s, pi in parts], -1)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    dh = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(fused, (x, A), dh), torch.autograd.grad(plain, (x, A), dh), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    held = {t.data_ptr() for t in kept_by(lambda: OPS.dropped_linear(x, A, seed, ranks, p))}
    assert held == {x.data_ptr(), A.data_ptr(), seed.data_ptr()}


def test_dropped_linear_on_strided_inputs_and_where_x_needs_no_gradient():
    x, A = torch.randn(19, 4, dtype=torch.float64).t(), leaf(3, 19)
    h = OPS.dropped_linear(x, A, seeds(4), [3], [0.5])
    dh = torch.randn(3, 4, dtype=torch.float64).t()
    dropped = OPS.dropout(x, seeds(4), 0.5)
    torch.testing.assert_close(h, dropped @ A.t(), rtol=1e-12, atol=1e-12)
    (dA,) = torch.autograd.grad(h, A, dh)
    torch.testing.assert_close(dA, dh.t() @ dropped, rtol=1e-12, atol=1e-12)


def test_opcheck():
    x, A = leaf(2, 3, 19), leaf(5, 19)
    torch.library.opcheck(OPS.dropout.default, (x, seeds(1), 0.3))
    torch.library.opcheck(OPS.dropped_linear_core.default, (x, A, seeds(1, 2), [2, 3], [0.3, 0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_autocast(dtype):
    x, A, seed = torch.randn(6, 19, dtype=dtype), torch.randn(3, 19, dtype=torch.float32), seeds(8)
    exact = F.linear(OPS.dropout(x.double(), seed, 0.5), A.to(dtype).double())
    h = OPS.dropped_linear(x, A, seed, [3], [0.5])
    assert h.dtype == dtype
    bound = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=bound)
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS.dropped_linear(x.float(), A, seed, [3], [0.5]).dtype == torch.bfloat16
        assert OPS.dropped_linear(x.double(), A.double(), seed, [3], [0.5]).dtype == torch.float64


def test_checkpointing_draws_the_same_again():
    x, A = leaf(6, 19), leaf(3, 19)

    def step(x: Tensor) -> Tensor:
        return OPS.dropped_linear(x, A, OPS.draw(x), [3], [0.5]).square() + OPS.dropout(x, OPS.draw(x), 0.2).sum()

    found = []
    for run in (step, lambda x: checkpoint(step, x, use_reentrant=False)):
        torch.manual_seed(2)
        found.append(torch.autograd.grad(run(x).sum(), (x, A)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


BUILDS = operators.TARGETS
WIDTHS = (1, 7, 8, 19, 63, 64, 127, 256, 300, 513)


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> build.Build:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    found = operators.kernels(request.param)
    assert found.library() is not None, found.failure
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cpu_kernels_follow_the_definition_to_the_bit(kernels, dtype):
    for width, seed in itertools.product(WIDTHS, (seeds(0), seeds(2**63 - 2), seeds(2**32 + 5))):
        x = torch.randn(5, width).to(dtype)
        for given in (x, torch.randn(width, 5).to(dtype).t(), torch.randn(5, 2 * width).to(dtype)[:, :width], x[:0]):
            found = operators.loaded(kernels).dropout(given, seed, 0.3)
            assert torch.equal(found != 0, masks.kept(*given.shape, seed, 0.3))  # no number of x is zero
            whole = given * masks.scale(0.3)
            torch.testing.assert_close(found, torch.where(found != 0, whole, found))


def test_without_cpu_kernels_the_numbers_are_the_same(monkeypatch):
    x, A, seed = torch.randn(6, 40), torch.randn(5, 40, requires_grad=True), seeds(3, 4)
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv(build.SWITCH, switch)
        x = x.detach().requires_grad_()
        h = OPS.dropped_linear(x, A, seed, [2, 3], [0.2, 0.4])
        found.append((h, *torch.autograd.grad(h.square().sum(), (x, A))))
    assert operators.serving(x, seed) is None
    assert operators.route() == "PyTorch operators, no C++ kernels: REWRITE_CPU_KERNELS=0"
    for a, b in zip(*found, strict=True):  # float32 sums in another order
        assert float(((a - b).norm() / b.norm()).detach()) < 5e-7


def test_explain_says_what_computes_masks():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    rewrite.attach(model, "lora(r=2, dropout=0.1)@linear")
    assert f"adapters on the CPU: {operators.route()}" in rewrite.explain(model)
    rewrite.attach(rewrite.remove(model), "lora(r=2)@linear")
    assert "adapters on" not in rewrite.explain(model)
