"""Sparse and spectral forms: values at coordinates, k in a row, and transforms of them."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewrite.codegen.forms import (
    IN,
    OUT,
    TOKENS,
    Coordinates,
    Dense,
    Fourier,
    Haar,
    RowSparse,
    scattered,
    sparse,
)
from rewrite.codegen.maps import Convolution, Lookup, Rows

OUTER, INNER, COUNT = 7, 5, 11


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def coordinates(dtype: torch.dtype = torch.int32) -> Coordinates:
    at = scattered(COUNT, OUTER, INNER, 3).to(dtype)
    return Coordinates(matrix(COUNT), at[0], at[1], OUTER, INNER)


def row_sparse() -> RowSparse:
    columns = torch.stack([torch.randperm(INNER)[:3] for _ in range(OUTER)])
    return RowSparse(matrix(OUTER, 3), columns.to(torch.int32), INNER)


SPARSE = {
    "coordinates": coordinates,
    "twice the same": lambda: Coordinates(matrix(3), torch.tensor([2, 2, 6]), torch.tensor([4, 4, 0]), OUTER, INNER),
    "none": lambda: Coordinates(matrix(0), torch.zeros(0).int(), torch.zeros(0).int(), OUTER, INNER),
    "rows": row_sparse,
}
every_form = pytest.mark.parametrize("form", SPARSE.values(), ids=SPARSE)


@pytest.fixture(params=[1 << 22, 8], ids=["at once", "in chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "CHUNK", request.param)


@every_form
@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0)], ids=str)
def test_factored_equals_materialised_with_gradients(form, lead):
    S, x = form(), matrix(*lead, INNER).requires_grad_()
    S.values.requires_grad_()
    dense, g = S.materialise(), matrix(*lead, OUTER)
    assert dense.shape == (OUTER, INNER)
    close(S.apply(x), x @ dense.T)
    found = torch.autograd.grad(S.apply(x, scale=0.25), (x, S.values), g)
    wanted = torch.autograd.grad(x @ dense.T * 0.25, (x, S.values), g)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    close(S.T.materialise(), dense.T)
    close(S.T.apply(g), g @ dense)


def test_values_stand_at_their_coordinates():
    S = coordinates()
    dense = torch.zeros(OUTER, INNER, dtype=torch.float64)
    for v, i, j in zip(S.values, S.rows.tolist(), S.columns.tolist(), strict=True):
        dense[i, j] = v
    assert torch.equal(S.materialise(), dense)
    R = row_sparse()
    assert torch.equal(R.materialise().gather(1, R.columns.long()), R.values)
    assert int((R.materialise() != 0).sum()) == R.values.numel()


@every_form
def test_through_an_embedding_and_a_convolution_and_at_rows(form):
    S, rows = form(), Rows(7, 1, 2, 3)
    dense, ids, x = S.materialise(), torch.randint(0, INNER, (2, 3)), matrix(4, INNER)
    close(S.apply(ids, Lookup(), like=x), dense.T[ids])
    wave = matrix(2, 1, 9)
    close(S.apply(wave, Convolution((INNER,))), F.conv1d(wave, dense[:, None]))
    close(S.spread(rows).apply(x), rows.put(S.apply(x), -1))
    close(S.add_to(dense.new_zeros(21, INNER), rows=rows), rows.put(dense))


def test_a_stack_shares_its_coordinates():
    S = coordinates()
    stack = Coordinates(matrix(2, COUNT), S.rows, S.columns, OUTER, INNER)
    for values, dense in zip(stack.values, stack.materialise(), strict=True):
        assert torch.equal(Coordinates(values, S.rows, S.columns, OUTER, INNER).materialise(), dense)


class Sizes(TorchDispatchMode):
    """The sizes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_of_the_size_of_the_matrix_is_formed(transposed):
    n = 1000
    S = Coordinates(matrix(9).requires_grad_(), *scattered(9, n, n, 0), n, n)
    x = matrix(3, n).requires_grad_()
    with Sizes() as sizes:
        (S.T if transposed else S).apply(x).sum().backward()
    assert max(sizes.seen) <= 3 * n


@every_form
def test_half_precision_sums_in_single(form):
    S, x = form(), torch.randn(4, INNER, dtype=torch.bfloat16, requires_grad=True)
    S = S.map(lambda t: t.float().requires_grad_())
    y = S.apply(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert S.values.grad.dtype == torch.float32
    expected = x.double() @ S.materialise().double().T
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)  # two roundings to 8 bits


@every_form
def test_compiles_to_one_graph(form):
    S, x = form(), matrix(4, INNER).requires_grad_()
    S.values.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return S.apply(x).square().sum()

    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), (x, S.values))
    for one, other in zip(found, torch.autograd.grad(step(x), (x, S.values)), strict=True):
        close(one, other)


def test_costs():
    assert sympy.simplify(coordinates().cost() - TOKENS * COUNT * sparse.GATHER) == 0
    assert sympy.simplify(row_sparse().cost() - TOKENS * OUTER * 3 * sparse.GATHER) == 0
    big = {TOKENS: 2048, IN: 4096, OUT: 4096}
    assert Fourier(coordinates()).formation().subs(big) < 2048 * 4096**2
    assert Haar(coordinates(), OUTER, INNER).formation().subs(big) < Fourier(coordinates()).formation().subs(big)


def test_scattered_places_are_distinct_and_repeat():
    at = scattered(20, 4, 5, 1)
    assert sorted((at[0] * 5 + at[1]).tolist()) == list(range(20))
    assert torch.equal(at, scattered(20, 4, 5, 1))
    assert not torch.equal(at, scattered(20, 4, 5, 2))
    assert torch.equal(scattered(9, 4, 5, None), scattered(9, 4, 5, None))


# --- spectra ---


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (4, 6), (1, 3), (1, 1)])
def test_fourier_is_its_sum_of_waves(rows, columns):
    S = matrix(rows, columns)
    i, p = np.ogrid[:rows, :rows]
    j, q = np.ogrid[:columns, :columns]
    waves = np.exp(2j * np.pi * i * p / rows) @ S.numpy() @ np.exp(2j * np.pi * q * j / columns)
    close(Fourier(Dense(S)).materialise(), torch.from_numpy(waves.real / (rows * columns)))
    close(Fourier(Dense(S)).T.materialise(), Fourier(Dense(S)).materialise().T)


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (7, 5), (7, 6), (1, 1)])
def test_haar_patches(rows, columns):
    H, W = (rows + 1) // 2, (columns + 1) // 2
    S = matrix(2 * H, 2 * W)
    form = Haar(Dense(S), rows, columns)
    dense = form.materialise()
    assert dense.shape == (rows, columns)
    for i in range(rows):
        for j in range(columns):
            h, w, u, v = i // 2, j // 2, (-1) ** (i % 2), (-1) ** (j % 2)
            whole = S[h, w] + u * S[h, W + w] + v * S[H + h, w] + u * v * S[H + h, W + w]
            close(dense[i, j], whole / 2)
    close(form.T.materialise(), dense.T)
    if rows % 2 == columns % 2 == 0:  # orthogonal
        close(dense.square().sum(), S.square().sum())


@pytest.mark.parametrize("transform", [Fourier, lambda s: Haar(s, 8, 6)], ids=["fourier", "haar"])
def test_spectra_of_sparse_coefficients(transform):
    at, c = scattered(9, 8, 6, 0), matrix(9).requires_grad_()
    x = matrix(4, 6)

    def form(c: Tensor):
        return transform(Coordinates(c, at[0], at[1], 8, 6))

    close(form(c).apply(x), x @ form(c).materialise().T)
    close(form(c).T.apply(x.new_ones(2, 8)), x.new_ones(2, 8) @ form(c).materialise())
    assert torch.autograd.gradcheck(lambda c: form(c).apply(x), (c,))
    assert form(torch.stack([c, c])).materialise().shape == (2, 8, 6)
