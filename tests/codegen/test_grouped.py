"""Products of grouped rows: values, gradients, fakes and operation counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from rewrite.codegen import grouped
from rewrite.codegen.grouped import grouped_outer, grouped_product
from tests.models import assert_close

Tensor = torch.Tensor
GROUPS = {
    "even": ([3, 6, 9], 9),
    "empty groups": ([0, 5, 5, 9], 9),
    "rows beyond": ([2, 2, 6], 9),  # of experts on another machine
    "none": ([0, 0], 0),
}


def tensors(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    ends, rows = GROUPS[name]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=g, dtype=torch.float64)
    M = torch.randn(len(ends), 5, 7, generator=g, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), M.requires_grad_(), torch.tensor(ends, dtype=torch.int32)


def by_hand(x: Tensor, M: Tensor, offs: Tensor) -> Tensor:
    group = torch.searchsorted(offs.long(), torch.arange(len(x)), right=True)
    inside = (group < len(M))[:, None]
    return torch.einsum("tk,tkn->tn", x, M[group.clamp(max=len(M) - 1)]) * inside


@pytest.mark.parametrize("name", GROUPS)
def test_product_and_gradients(name: str):
    x, M, offs = tensors(name)
    y, expected = torch.ops.rewrite.grouped_product(x, M, offs), by_hand(x, M, offs)
    assert_close(y, expected)
    weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()
    ours, theirs = (torch.autograd.grad((t * weights).sum(), [x, M]) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["even", "empty groups", "rows beyond"])
def test_the_operators_are_well_behaved(name: str):
    x, M, offs = tensors(name)
    torch.library.opcheck(torch.ops.rewrite.grouped_product.default, (x, M, offs))
    torch.library.opcheck(torch.ops.rewrite.grouped_outer.default, (x.detach(), x.detach(), offs))


def test_matrices_are_cast_to_the_rows_and_the_copy_is_not_kept():
    x, M, offs = tensors("even", torch.bfloat16)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = torch.ops.rewrite.grouped_product(x, M, offs)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert M.grad is not None
    assert M.grad.dtype == torch.float64
    assert {t.data_ptr() for t in seen} == {t.data_ptr() for t in (x, M, offs)}


def test_frozen_matrices_get_no_gradient():
    x, M, offs = tensors("even")
    with FlopCounterMode(display=False) as frozen:
        torch.ops.rewrite.grouped_product(x, M.detach(), offs).sum().backward()
    with FlopCounterMode(display=False) as trained:
        torch.ops.rewrite.grouped_product(x, M, offs).sum().backward()
    one = 2 * 9 * 5 * 7
    assert (frozen.get_total_flops(), trained.get_total_flops()) == (2 * one, 3 * one)


@pytest.mark.parametrize("name", ["even", "empty groups", "rows beyond"])
def test_the_kernel_on_padded_operands(name: str, monkeypatch: pytest.MonkeyPatch):
    # Rows of 5 and 7 numbers are aligned to nothing: the kernel refuses them as they are, on every device.
    x, M, offs = (t.detach() for t in tensors(name, torch.float32))
    dy = torch.randn(len(x), 7, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="16 bytes"):
        F.grouped_mm(x, M.float(), offs=offs)
    expected = grouped_product(x, M, offs), grouped_outer(x, dy, offs)
    monkeypatch.setattr(grouped, "_has_kernel", lambda _: True)
    assert_close(grouped_product(x, M, offs), expected[0], 1e-6)
    assert_close(grouped_outer(x, dy, offs), expected[1], 1e-6)


def test_torch_operations_are_counted_too():
    x, M, offs = torch.randn(9, 4), torch.randn(3, 4, 8), torch.tensor([3, 6, 9], dtype=torch.int32)
    with FlopCounterMode(display=False) as counted:
        F.grouped_mm(x, M, offs=offs)
        F.grouped_mm(x.t(), x, offs=offs)
    assert counted.get_total_flops() == 2 * 9 * 4 * 8 + 2 * 9 * 4 * 4
