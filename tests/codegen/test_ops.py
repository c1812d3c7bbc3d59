"""The fused operators against plain PyTorch in float64: values, every gradient, fakes, autocast, odd sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewrite.codegen import nf4, ops
from rewrite.codegen.storage import Nf4, layout
from rewrite.errors import RewriteError

OUT, IN = 11, 6
CORE = torch.ops.rewrite.adapted_linear_core.default


def leaf(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def stored_weight(kind: str) -> tuple[list[Tensor], str]:
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    if kind == "dense":
        return [weight], "dense"
    codes, absmax = nf4.quantize(weight, 64)
    text = str(Nf4((OUT, IN), torch.float64, 64))
    if kind == "nf4":
        return [codes, absmax], text
    small, nested, offset = nf4.quantize_absmax(absmax)
    return [codes, small, nested, nf4.dynamic_map(), offset], text


def branches(shape: tuple[int, ...], rows: list[tuple[int, int, int, float]]):
    """(h, B, scale, start) for branches of (start, rows, rank, scale)."""
    h = [leaf(*shape[:-1], rank) for _, _, rank, _ in rows]
    B = [leaf(count, rank) for _, count, rank, _ in rows]
    return h, B, [s for *_, s in rows], [at for at, *_ in rows]


def reference(x, weight, text, bias, h, B, scale, start) -> Tensor:
    y = F.linear(x, ops.decode(weight, text), bias)
    for hi, Bi, si, at in zip(h, B, scale, start, strict=True):
        y = y + F.pad(si * F.linear(hi, Bi), (at, OUT - at - Bi.shape[0]))
    return y


BRANCHES = {
    "none": [],
    "whole": [(0, OUT, 3, 1.0)],
    "scaled": [(0, OUT, 3, -0.4)],
    "rows": [(2, 4, 2, 1.5)],
    "three": [(0, OUT, 3, 1.0), (0, 4, 2, 2.0), (7, 4, 1, 0.5)],
}


@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4 double"])
@pytest.mark.parametrize("rows", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("shape", [(4, IN), (2, 3, IN), (1, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_equals_plain_operators(kind, rows, shape, bias):
    weight, text = stored_weight(kind)
    x, c = leaf(*shape), leaf(OUT) if bias else None
    arguments = (x, weight, text, c, *branches(shape, rows))
    fused, plain = torch.ops.rewrite.adapted_linear(*arguments), reference(*arguments)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    leaves = [t for t in (x, c, *arguments[4], *arguments[5]) if t is not None]
    dy = torch.randn_like(plain)
    ours, theirs = torch.autograd.grad(fused, leaves, dy), torch.autograd.grad(plain, leaves, dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_opcheck(kind):
    weight, text = stored_weight(kind)
    h, B, scale, start = branches((2, 3, IN), BRANCHES["three"])
    for skip in [[], [1, 4]] if kind == "dense" else [[]]:
        torch.library.opcheck(CORE, (leaf(2, 3, IN), weight, text, leaf(OUT), h, B, scale, start, skip))


@pytest.mark.parametrize("skip", [(0, 2), (1, 4), (4, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, IN), (1, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_columns_that_the_base_product_leaves_out(skip, shape, bias):
    weight, _ = stored_weight("dense")
    x, c = leaf(*shape), leaf(OUT) if bias else None
    given = branches(shape, [(0, OUT, skip[1] - skip[0], 1.0), *BRANCHES["three"]])
    given[0][0] = x[..., slice(*skip)].clone()
    fused = torch.ops.rewrite.adapted_linear(x, weight, "dense", c, *given, skip)
    rest = weight[0].clone()
    rest[:, slice(*skip)] = 0
    plain = reference(x, [rest], "dense", c, *given)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    leaves = [t for t in (x, c, *given[0][1:], *given[1]) if t is not None]
    dy = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (fused, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_inputs_that_are_not_contiguous():
    weight, text = stored_weight("dense")
    x, wide = leaf(3, IN, 2).transpose(1, 2), leaf(3, 2, 8)
    h, B = [wide[..., 2:5]], [leaf(3, OUT).t()]
    arguments = (x, weight, text, None, h, B, [1.0], [0])
    torch.testing.assert_close(torch.ops.rewrite.adapted_linear(*arguments), reference(*arguments))


def test_nothing_of_the_weight_is_saved():
    weight, text = stored_weight("nf4")
    h, B, scale, start = branches((4, IN), BRANCHES["whole"])
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        torch.ops.rewrite.adapted_linear(leaf(4, IN), weight, text, None, h, B, scale, start)
    assert saved
    assert (OUT, IN) not in saved


def test_a_weight_that_trains_is_refused():
    with pytest.raises(RewriteError, match="no gradient for its weight"):
        torch.ops.rewrite.adapted_linear(leaf(2, IN), [leaf(OUT, IN)], "dense", None, [], [], [], [])


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_autocast(kind):
    weight, text = stored_weight(kind)
    weight = [w.float() if w.is_floating_point() else w for w in weight]
    text = text.replace("float64", "float32")
    x, h, B = torch.randn(4, IN), torch.randn(4, 3), torch.randn(OUT, 3)
    with torch.autocast("cpu", torch.bfloat16):
        fused = torch.ops.rewrite.adapted_linear(x, weight, text, None, [h], [B], [1.0], [0])
        plain = F.linear(x, ops.decode(weight, text)) + F.linear(h, B)
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused.float(), plain.float(), rtol=2e-2, atol=2e-2)


def test_half_precision_activations_with_float32_adapters():
    x, w = torch.randn(4, IN, dtype=torch.bfloat16), torch.randn(OUT, IN, dtype=torch.bfloat16)
    h, B = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(OUT, 3, requires_grad=True)
    y = torch.ops.rewrite.adapted_linear(x, [w], "dense", None, [h], [B], [1.0], [0])
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert B.grad is not None
    assert B.grad.dtype == torch.float32


def test_layouts_print_and_read_back():
    text = "nf4:bfloat16:64:11x7"
    assert str(layout(text)) == text
    assert str(layout("dense")) == "dense"
    with pytest.raises(ValueError, match="unknown storage layout"):
        layout("fp4:bfloat16:64:11x7")


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    weight, text = stored_weight("nf4")
    h, B, scale, start = branches((4, IN), BRANCHES["whole"])
    with FlopCounterMode(display=False) as count:
        torch.ops.rewrite.adapted_linear(leaf(4, IN), weight, text, None, h, B, scale, start).sum().backward()
    forward, dx, dh, dB = 4 * (OUT * IN + OUT * 3), 4 * OUT * IN, 4 * OUT * 3, 4 * OUT * 3
    assert count.get_total_flops() == 2 * (forward + dx + dh + dB)
    dense = stored_weight("dense")
    with FlopCounterMode(display=False) as less:
        y = torch.ops.rewrite.adapted_linear(leaf(4, IN), *dense, None, h, B, scale, start, [1, 4])
        y.sum().backward()
    assert count.get_total_flops() - less.get_total_flops() == 2 * 2 * 4 * OUT * 3


@pytest.mark.parametrize("shape", [(4, IN), (2, 3, IN), (1, IN), (0, IN)], ids=str)
def test_low_rank_of_another_dtype(shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    A, B = torch.randn(3, IN, requires_grad=True), torch.randn(OUT, 3, requires_grad=True)
    ours = torch.ops.rewrite.low_rank(x, A, B, 0.7)
    plain = F.linear(F.linear(x, A.double()), B.double()) * 0.7
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(ours, (x, A, B), dy), torch.autograd.grad(plain, (x, A, B), dy), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.library.opcheck(torch.ops.rewrite.low_rank.default, (x, A, B, 0.7))
