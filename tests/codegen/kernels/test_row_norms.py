"""Row norms of adapted weights: the kernel and its operator against the dense weight in float64."""

import pytest
import torch

from rewrite.codegen import nf4
from rewrite.codegen import row_norms as op
from rewrite.codegen.kernels import row_norms
from rewrite.codegen.storage import Nf4

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
"""Of a norm: float32 sums of exact products, whatever the dtype of what is multiplied."""


def weights(N, K, r, dtype, device, rows=1):
    W = torch.randn(N * rows, K, device=device).to(dtype)[::rows]
    return W, torch.randn(r, K, device=device).to(dtype) / 4, torch.randn(N, r, device=device).to(dtype) / 4


def dense(W, A, B, scale):
    return (W.double() + scale * (B.double() @ A.double())).norm(dim=-1)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(37, 91, 3), (1, 1, 1), (64, 256, 16), (33, 130, 40), (17, 64, 64)], ids=str)
def test_equals_the_norms_of_the_dense_weight(dtype, shape, device):
    W, A, B = weights(*shape, dtype, device)
    kernel = row_norms.kernel_of([W], "dense", A, -0.7)
    assert isinstance(kernel, row_norms.RowNorms)
    found = row_norms.row_norms(kernel, [W], A, B)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense(W, A, B, -0.7), rtol=BOUNDS[dtype], atol=1e-6)


def test_weights_and_factors_that_are_not_contiguous(device):
    W, A, B = weights(12, 24, 5, torch.bfloat16, device, rows=2)
    A, B = A.t().contiguous().t(), B.t().contiguous().t()
    kernel = row_norms.kernel_of([W], "dense", A, 2.0)
    assert isinstance(kernel, row_norms.RowNorms)
    torch.testing.assert_close(
        row_norms.row_norms(kernel, [W], A.float(), B.float()).double(), dense(W, A, B, 2.0), rtol=1e-5, atol=0
    )


def test_a_row_that_the_update_takes_away_is_zero_not_nan(device):
    W, A, _ = weights(8, 32, 1, torch.float32, device)
    B = torch.zeros(8, 1, device=device)
    A[0], B[3] = W[3], -1.0
    kernel = row_norms.kernel_of([W], "dense", A, 1.0)
    found = row_norms.row_norms(kernel, [W], A, B)  # type: ignore[arg-type]
    assert found[3] < 1e-2 * W[3].norm()
    assert not found.isnan().any()


def test_reasons():
    def reason(W, A, layout="dense"):
        return str(row_norms.kernel_of(W, layout, A, 1.0))

    assert "more than 64" in reason([torch.ones(4, 128)], torch.ones(65, 128))
    assert "gaps" in reason([torch.ones(128, 4).t()], torch.ones(2, 128))
    assert "float64" in reason([torch.ones(4, 8).double()], torch.ones(2, 8))
    packed = nf4.quantize(torch.ones(4, 96), 64)
    assert "whole blocks" in reason(packed, torch.ones(2, 96), str(Nf4((4, 96), torch.float32, 64)))
    assert "another dtype or size" in reason(packed, torch.ones(2, 64), str(Nf4((4, 64), torch.float32, 64)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(37, 192, 3), (5, 64, 16), (32, 320, 33)], ids=str)
def test_stored_weights_are_decoded_on_their_way(shape, nested, device):
    N, K, r = shape
    _, A, B = weights(N, K, r, torch.bfloat16, device)
    packed = nf4.Nf4Tensors.from_weight(torch.randn(N, K, device=device), 64, nested)
    scales = [packed.nested.absmax, packed.nested.code, packed.nested.offset] if packed.nested else []
    stored = [packed.codes, packed.absmax, *scales]
    kernel = row_norms.kernel_of(stored, str(Nf4((N, K), torch.bfloat16, 64)), A, 1.5)
    assert isinstance(kernel, row_norms.RowNorms)
    found = row_norms.row_norms(kernel, stored, A, B)
    exact = dense(packed.dequantize(torch.bfloat16), A, B, 1.5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["dense", "nf4"])
def test_the_operator_and_its_gradients(layout):
    W = torch.randn(11, 6, dtype=torch.float64)
    stored, text = [W], "dense"
    if layout == "nf4":
        stored, text = list(nf4.quantize(W, 64)), str(Nf4((11, 6), torch.float64, 64))
        W = torch.ops.rewrite.decode(stored, text)
    A, B = torch.randn(3, 6, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    for factor in (A, B):
        factor.requires_grad_()
    found = torch.ops.rewrite.adapted_row_norms(stored, text, A, B, 0.5)
    plain = (W + 0.5 * B @ A).norm(dim=-1)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    dn = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad(n, (A, B), dn) for n in (found, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.library.opcheck(torch.ops.rewrite.adapted_row_norms.default, (stored, text, A, B, 0.5))


def test_parameters_of_another_dtype_are_those_of_the_product():
    W, A, B = weights(9, 16, 2, torch.bfloat16, "cpu")
    found = op.adapted_row_norms([W], "dense", A.float() + 1e-4, B.float(), 1.0)
    torch.testing.assert_close(found.double(), dense(W, (A.float() + 1e-4).bfloat16(), B, 1.0), rtol=1e-2, atol=0)


def test_autocast_does_not_reach_in():
    W, A, B = weights(9, 16, 2, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for factor in (A, B):
            factor.requires_grad_()
        found = torch.ops.rewrite.adapted_row_norms([W], "dense", A, B, 1.0)
        (dA,) = torch.autograd.grad(torch.nn.functional.linear(W, A).sum(), A)  # what it cast would have no derivative
        inside = torch.autograd.grad(found.sum(), (A, B))
    torch.testing.assert_close(found.double(), dense(W, A, B, 1.0), rtol=2e-6, atol=0)
    exact = torch.autograd.grad(dense(W, A, B, 1.0).sum(), (A, B))
    torch.testing.assert_close(inside, exact, rtol=1e-5, atol=1e-5)
    assert dA.shape == A.shape
