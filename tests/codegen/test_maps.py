"""Layer maps against the modules of torch: split in two, seen as a matrix, and stored again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite.codegen.maps import LINEAR, Convolution, LayerMap, Lookup, Matmul, Rows
from rewrite.layers import layer_of

RANK = 3


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


CONV = {
    "plain": (nn.Conv1d, (5, 7, 3), {}),
    "even kernel, same": (nn.Conv1d, (5, 7, 4), {"padding": "same"}),
    "valid": (nn.Conv2d, (5, 7, (3, 2)), {"padding": "valid", "stride": (2, 1)}),
    "same, dilated": (nn.Conv2d, (5, 7, (3, 4)), {"padding": "same", "dilation": (1, 2)}),
    "unequal": (nn.Conv2d, (5, 7, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "3-d": (nn.Conv3d, (2, 3, (1, 2, 3)), {"padding": (0, 1, 2), "stride": (1, 2, 1)}),
    "groups": (nn.Conv1d, (6, 9, 3), {"groups": 3, "padding": 2}),
    "depthwise": (nn.Conv2d, (5, 5, 3), {"groups": 5, "padding": 1}),
    "depthwise, multiplied": (nn.Conv1d, (5, 15, 4), {"groups": 5, "padding": 3}),
    "reflect": (nn.Conv2d, (5, 7, 3), {"padding": (2, 1), "padding_mode": "reflect"}),
    "replicate": (nn.Conv1d, (5, 7, 3), {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    "circular, groups": (nn.Conv2d, (4, 6, (2, 3)), {"padding": "same", "padding_mode": "circular", "groups": 2}),
    "reflect, valid": (nn.Conv1d, (5, 7, 3), {"padding": "valid", "padding_mode": "reflect"}),
    "reflect 3-d": (nn.Conv3d, (2, 3, (1, 2, 3)), {"padding": (0, 1, 2), "padding_mode": "reflect"}),
    "transposed": (nn.ConvTranspose1d, (5, 7, 3), {"stride": 2, "output_padding": 1, "padding": 1}),
    "transposed, groups": (nn.ConvTranspose2d, (6, 9, (3, 2)), {"groups": 3, "stride": 3, "output_padding": (1, 2)}),
    "transposed, dilated": (nn.ConvTranspose3d, (2, 3, (1, 2, 3)), {"dilation": (1, 2, 1), "stride": 1}),
    "transposed, depthwise": (nn.ConvTranspose1d, (5, 5, 4), {"groups": 5}),
}  # fmt: skip
SIZES = {1: (9,), 2: (9, 8), 3: (4, 5, 6)}


def conv(name: str, bias: bool = False) -> tuple[nn.Module, Convolution, Tensor]:
    cls, args, settings = CONV[name]
    layer = cls(*args, bias=bias, **settings).double()
    found = layer_of(layer)
    assert isinstance(found, Convolution)
    return layer, found, randn(2, args[0], *SIZES[len(found.kernel)])


def with_weight(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def factors(layer: LayerMap, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    rows, columns = layer.matrix_shape(shape)
    return randn(RANK, columns), randn(rows, RANK)


def assert_split(layer: nn.Module, found: LayerMap, x: Tensor) -> None:
    weight: Any = layer.weight
    A, B = factors(found, weight.shape)
    expected = with_weight(layer, found.stored(B @ A, weight.shape), x)
    torch.testing.assert_close(found.expand(found.shrink(x, A), B), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONV)
def test_a_convolution_is_its_two_parts(name: str):
    layer, found, x = conv(name)
    assert_split(layer, found, x)
    assert_split(layer, found, x[0])
    if "circular" not in name and "reflect" not in name:  # torch does not pad empty batches that way
        assert_split(layer, found, x[:0])


@pytest.mark.parametrize("name", CONV)
def test_a_convolution_is_its_matrix(name: str):
    layer, found, _ = conv(name)
    weight: Any = layer.weight
    matrix = found.matrix(weight)
    assert tuple(matrix.shape) == found.matrix_shape(weight.shape)
    assert torch.equal(found.stored(matrix, weight.shape), weight)
    if not found.transposed:
        assert matrix.data_ptr() == weight.data_ptr()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONV)
def test_a_shift_goes_where_the_bias_does(name: str):
    layer, found, x = conv(name, bias=True)
    weight: Any = layer.weight
    c = randn(found.outputs(found.matrix_shape(weight.shape)[0]))
    moved = copy.deepcopy(layer)
    moved.bias.data += c  # type: ignore[operator, union-attr]
    torch.testing.assert_close(layer(x) + found.broadcast(c), moved(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]) + found.broadcast(c), moved(x[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONV)
def test_the_channels_of_a_convolution(name: str):
    layer, found, x = conv(name)
    for y in (layer(x), layer(x[0])):
        assert y.shape[found.channel] == layer.out_channels


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (0, 6), (6,)])
def test_a_linear_layer(shape: tuple[int, ...]):
    layer = nn.Linear(6, 5, bias=False).double()
    assert_split(layer, LINEAR, randn(*shape))
    weight = randn(6, 5)
    assert torch.equal(Matmul(True).matrix(weight), weight.t())
    assert torch.equal(Matmul(True).stored(weight.t(), weight.shape), weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_matrices(transposed: bool):
    weight, layer = randn(4, 6, 5), Matmul(transposed)
    matrix = layer.matrix(weight)
    assert tuple(matrix.shape) == layer.matrix_shape(weight.shape) == ((4, 5, 6) if transposed else (4, 6, 5))
    assert torch.equal(layer.stored(matrix, weight.shape), weight)


@pytest.mark.parametrize("settings", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (0, 3), ()])
def test_an_embedding(shape: tuple[int, ...], settings: dict[str, Any]):
    layer = nn.Embedding(11, 5, **settings).double()
    found, ids = layer_of(layer), torch.randint(0, 11, shape)
    assert isinstance(found, Lookup)
    assert_split(layer, found, ids)


def test_the_gradients_of_an_embedding():
    layer, found, ids = nn.Embedding(11, 5).double(), Lookup(), torch.randint(0, 11, (3, 7))
    A, B = (t.requires_grad_() for t in factors(found, (11, 5)))
    y = with_weight(layer, found.stored(B @ A, (11, 5)), ids)
    wanted = torch.autograd.grad(y, (A, B), seed := randn(3, 7, 5))
    torch.testing.assert_close(torch.autograd.grad(found.expand(found.shrink(ids, A), B), (A, B), seed), wanted)


def test_the_padding_of_an_embedding_has_no_gradient():
    found, ids, A = Lookup(padding_idx=2), torch.arange(4), randn(RANK, 4).requires_grad_()
    found.shrink(ids, A).sum().backward()
    assert A.grad is not None
    assert A.grad.any(dim=0).tolist() == [True, True, False, True]


ROWS = [Rows(1, 0, 4, 12), Rows(1, 5, 9, 12), Rows(1, 0, 12, 12), Rows(3, 1, 3, 4), Rows(6, 0, 1, 2), Rows(4, 2, 3, 3)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_rows(rows: Rows, dim: int):
    whole = randn(2, 12, 12, 12)
    part = whole.index_select(dim, torch.tensor(rows.indices()))
    assert torch.equal(rows.take(whole, dim), part)
    assert part.shape[dim] == len(rows)
    placed = torch.zeros_like(whole).index_copy(dim, torch.tensor(rows.indices()), part)
    assert torch.equal(rows.put(part, dim), placed)
    new = torch.randn_like(part)
    assert torch.equal(rows.replace(whole, new, dim), whole.index_copy(dim, torch.tensor(rows.indices()), new))
    assert rows.width == 12
    assert hash(rows) == hash(copy.copy(rows))


@pytest.mark.parametrize("numbers", [(0, 0, 1, 1), (1, 1, 1, 2), (1, 0, 3, 2), (1, -1, 1, 2)])
def test_rows_that_are_none(numbers: tuple[int, int, int, int]):
    with pytest.raises(ValueError, match="no part"):
        Rows(*numbers)


def test_a_plain_slice_is_a_view():
    weight = randn(12, 5)
    Rows(1, 3, 5, 12).take(weight).zero_()
    assert weight[3:5].abs().sum() == 0
    assert (weight[:3] != 0).all()


def test_maps_are_values():
    left, right = (layer_of(nn.Conv1d(4, 4, 3, padding=1)) for _ in range(2))
    assert left == right
    assert hash(left) == hash(right)
    assert left != layer_of(nn.Conv1d(4, 4, 3))


def test_the_base_class_states_nothing():
    for call in (
        lambda m: m.matrix_shape(()),
        lambda m: m.matrix(None),
        lambda m: m.stored(None, ()),
        lambda m: m.shrink(None, None),
        lambda m: m.expand(None, None),
    ):
        with pytest.raises(NotImplementedError):
            call(LayerMap())
