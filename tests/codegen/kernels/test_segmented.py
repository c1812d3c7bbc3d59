"""Segmented kernels and operators against plain products in float64, with gates of every kind."""

import pytest
import torch

from rewrite.codegen import segmented as op
from rewrite.codegen.kernels import outer_product
from rewrite.codegen.kernels import segmented as kernels
from rewrite.codegen.kernels.outer_product import OuterProduct

BOUNDS = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}
"""Of a result: one rounding to its dtype, after float32 sums."""


def gates(kind: str, batch: int, ranks: list[int], device) -> torch.Tensor:
    """(batch, sum of ranks): one adapter a row, mixtures, or none at all."""
    n = len(ranks)
    weight = torch.zeros(batch, n)
    for row in range(batch):
        if kind == "one":
            weight[row, (row * 7 + 1) % n] = 1.0
        elif kind == "sorted":
            weight[row, row * n // batch] = 0.5
        elif kind == "mixed" and row % 3:
            weight[row] = torch.randn(n) * (torch.rand(n) < 0.4)
    return torch.repeat_interleave(weight, torch.tensor(ranks), dim=1).to(device)


CASES = [  # batch, tokens, ranks, d_in, d_out
    (4, 37, [1, 16, 64, 3], 75, 41),
    (5, 1, [8, 8, 8, 8, 8], 64, 33),
    (1, 1, [2, 3], 17, 130),
    (3, 100, [5], 33, 20),
    (70, 1, [4] * 12, 20, 24),
    (0, 5, [3, 4], 8, 9),
    (3, 0, [3, 4], 8, 9),
]


def case(shape, kind, dtype, device):
    batch, tokens, ranks, K, N = shape
    R = sum(ranks)
    x, h, y = (torch.randn(batch, tokens, n, device=device).to(dtype) for n in (K, R, N))
    A, B = torch.randn(R, K, device=device).to(dtype), torch.randn(N, R, device=device).to(dtype)
    return x, h, y, A, B, gates(kind, batch, ranks, device)


def close(found, exact, dtype, terms=None):
    """Within the bound relative to the size of what was summed."""
    size = exact.abs().max() if exact.numel() else 1.0
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=BOUNDS[dtype], atol=float(BOUNDS[dtype] * size / 8))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, "mixed") for dtype in BOUNDS] + [(torch.bfloat16, kind) for kind in ("one", "sorted", "none")],
    ids=str,
)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_kernels_equal_plain_products(shape, kind, dtype, device):
    x, h, y, A, B, gate = case(shape, kind, dtype, device)
    wide = [t.double() for t in (x, h, y, A, B, gate)]
    within = op._within(wide[1], wide[5])
    close(kernels.shrink(x, A, gate), op._shrink(wide[0], wide[3], wide[5]), dtype)
    close(kernels.expand(None, h, B, gate), within @ wide[4].t(), dtype)
    close(kernels.expand(y.clone(), h, B, gate), wide[2] + within @ wide[4].t(), dtype)
    close(kernels.outer(h, x, gate), within.flatten(0, 1).t() @ wide[0].flatten(0, 1), dtype)


def test_slices_and_transposed_factors_are_read_where_they_lie(device):
    dtype = torch.bfloat16
    x, h, _, A, B, gate = case((3, 30, [4, 8], 40, 24), "mixed", dtype, device)
    wide_h, wide_gate = torch.cat([h, h, h], -1)[..., 12:24], torch.cat([gate, gate], 1)[:, 12:]
    A, B = A.t().contiguous().t(), B.t().contiguous().t()
    assert wide_h.stride(-2) == 36
    assert A.stride(0) == 1
    close(kernels.shrink(x, A, wide_gate), op._shrink(x.double(), A.double(), gate.double()), dtype)
    within = op._within(wide_h.double(), gate)
    close(kernels.expand(None, wide_h, B, wide_gate), within @ B.double().t(), dtype)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    close(kernels.outer(wide_h, apart, wide_gate), within.flatten(0, 1).t() @ x.double().flatten(0, 1), dtype)


def test_what_is_not_used_is_not_read(device):
    """Values that no gate opens may be anything: they reach no result, and are zero in what is made of them."""
    x, h, y, A, B, gate = case((4, 40, [16, 16, 40], 64, 48), "sorted", torch.bfloat16, device)
    gate[:, 16:32] = 0
    h = torch.where((gate != 0)[:, None], h, float("nan"))
    A[16:32], B[:, 16:32] = float("nan"), 0.0
    assert not kernels.expand(y.clone(), h, B, gate).isnan().any()
    assert not kernels.outer(h, x, gate).isnan().any()
    tiles = kernels.open_tiles(gate, 160, 40, 64, 16)
    assert tiles.tolist() == [[1, 0, 0, 0, 0], [1, 0, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_sums_do_not_depend_on_the_launch(device):
    x, h, _, _, _, gate = case((8, 200, [16, 16], 64, 8), "one", torch.float32, device)
    many = OuterProduct.of(h.flatten(0, 1), x.flatten(0, 1), (64, 32), gate)
    assert many.parts > 1
    assert torch.equal(kernels.outer(h, x, gate), kernels.outer(h, x, gate))


@pytest.mark.parametrize("columns", [(0, 16), (5, 22), (24, 40)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 37, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_slice_reads_it_in_place(columns, tokens, dtype, device):
    x, dy = torch.randn(tokens, 40, device=device).to(dtype), torch.randn(tokens, 150, device=device).to(dtype)
    part = x[:, slice(*columns)]
    kernel = OuterProduct.of(part, dy, (64, 32), transposed=True)
    assert kernel.supports() is None
    close(kernel.compute(part, dy), dy.double().t() @ part.double(), dtype)


def test_where_a_slice_has_a_kernel(device):
    wide = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    kernel = outer_product.of_slice(wide, wide[:, 32:132])
    assert isinstance(kernel, OuterProduct)
    assert (kernel.h_row, kernel.ranks, kernel.parts) == (4096, 64, 4)
    assert "more than 128" in str(outer_product.of_slice(wide, wide[:, :160]))
    assert "L2 cache" in str(outer_product.of_slice(wide[:100], wide[:100, :16]))
    assert "gaps" in str(outer_product.of_slice(wide.t(), wide[:4096, :16]))


def test_reasons(device):
    part, dy = torch.ones(9, 200).bfloat16(), torch.ones(9, 5).bfloat16()
    assert "more than 128" in str(OuterProduct.of(part, dy, (64, 64)).supports())
    assert "cuBLAS is faster" in str(OuterProduct.of(part.float(), dy.float(), (64, 64)).supports())
    assert "float64" in str(kernels.reason(part.double(), part, part))


# --- the operators, on every device by whatever they choose ---


def leaves(shape, kind="mixed"):
    batch, tokens, ranks, K, N = shape
    R = sum(ranks)
    x = torch.randn(batch, tokens, K, dtype=torch.float64, requires_grad=True)
    A = torch.randn(R, K, dtype=torch.float64, requires_grad=True)
    B = torch.randn(N, R, dtype=torch.float64, requires_grad=True)
    W, bias = torch.randn(N, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64, requires_grad=True)
    return x, A, B, W, bias, gates(kind, batch, ranks, "cpu").double()


def layer(x, A, B, W, bias, gate):
    h = torch.ops.rewrite.segmented_shrink(x, A, gate)
    return torch.ops.rewrite.segmented_linear(x, [W], "dense", bias, h, B, gate)


@pytest.mark.parametrize("kind", ["one", "sorted", "mixed", "none"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_a_layer_and_its_gradients(shape, kind):
    x, A, B, W, bias, gate = leaves(shape, kind)
    found = layer(x, A, B, W, bias, gate)
    plain = x @ W.t() + bias + ((x @ A.t()) * gate[:, None]) @ B.t()
    torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad(y, (x, A, B, bias), dy) for y in (found, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_batches_of_vectors():
    x, A, B, W, _, gate = leaves((6, 1, [2, 3, 4], 11, 7), "one")
    found = layer(x[:, 0], A, B, W, None, gate)
    torch.testing.assert_close(found, x[:, 0] @ W.t() + ((x[:, 0] @ A.t()) * gate) @ B.t(), rtol=1e-11, atol=1e-11)


def test_opcheck():
    x, A, B, W, bias, gate = leaves((4, 3, [2, 3, 4], 11, 7), "one")
    h = op._shrink(x, A, gate).detach().requires_grad_()
    ops = torch.ops.rewrite
    torch.library.opcheck(ops.segmented_shrink_core.default, (x, A, gate))
    torch.library.opcheck(ops.segmented_linear_core.default, (x, [W], "dense", bias, h, B, gate))
    torch.library.opcheck(ops.segmented_product.default, (h.detach(), B.detach(), gate))
    torch.library.opcheck(ops.segmented_outer.default, (h.detach(), x.detach(), gate))


def test_autocast_multiplies_in_its_dtype():
    x, A, B, W, bias, gate = (t.float() for t in leaves((4, 3, [2, 3, 4], 11, 7), "one"))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, A, B, W, bias, gate)
    assert found.dtype == torch.bfloat16
    plain = x @ W.t() + bias + ((x @ A.t()) * gate[:, None]) @ B.t()
    torch.testing.assert_close(found.float(), plain, rtol=0.05, atol=0.15)


def test_gates_that_train_are_refused():
    x, A, _, _, _, gate = leaves((2, 3, [2], 5, 4))
    with pytest.raises(op.RewriteError, match="no gradient"):
        torch.ops.rewrite.segmented_shrink(x, A, gate.requires_grad_())


def test_segments_of_a_gate():
    gate = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 0, 0, 2], [1, 1, 0, 0, 0], [0, 0, 0, 3, 0]])
    found = [(ranks, rows if isinstance(rows, slice) else rows.tolist()) for ranks, rows in op.segments(gate)]
    assert found == [(slice(0, 2), [0, 2]), (slice(3, 4), slice(3, 4)), (slice(4, 5), slice(1, 2))]
    apart = [
        (slice(0, 2), slice(0, 1)),
        (slice(0, 2), slice(2, 3)),
        (slice(3, 4), slice(3, 4)),
        (slice(4, 5), slice(1, 2)),
    ]
    assert op.segments(gate, tokens=100) == apart
    assert op.segments(torch.ones(3, 4)) == [(slice(0, 4), slice(0, 3))]
    assert op.segments(torch.zeros(3, 4)) == []
