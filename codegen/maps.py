"""Layer maps: how a layer applies its weight, and the matrix that the weight is.

Every weight is seen as a matrix (..., d_out, d_in), with one leading dimension where it stacks experts, so that a
method never asks what kind of layer it stands at.  A map also splits the layer in two: for every B (d_out, r) and
A (r, d_in), `expand(shrink(x, A), B)` is the layer with the weight `stored(B @ A)` and no bias, in exact arithmetic.
Maps and rows hold numbers, never tensors; they work on tensors and on `torch.fx.Proxy` alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows `h * stride + [start, stop)` of a matrix, for every h below `count`; the matrix has `count * stride`.

    `count` = 1 is a plain slice; the query rows of a projection that interleaves its heads are one piece a head;
    `[::2]` is pieces of one row, two apart.

    >>> Rows(2, 0, 1, 3).take(torch.arange(6), dim=-1), Rows(2, 0, 1, 3).put(torch.ones(2), dim=-1)
    (tensor([0, 3]), tensor([1., 0., 0., 1., 0., 0.]))
    """

    count: int
    start: int
    stop: int
    stride: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.start < self.stop <= self.stride:
            raise ValueError(f"rows [{self.start}, {self.stop}) are no part of {self.stride}, {self.count} times")

    def __len__(self) -> int:
        return self.count * (self.stop - self.start)

    @property
    def width(self) -> int:
        """How many rows the whole matrix has."""
        return self.count * self.stride

    def indices(self) -> list[int]:
        """The row numbers, ascending.

        >>> Rows(2, 1, 3, 4).indices()
        [1, 2, 5, 6]
        """
        return [h * self.stride + i for h in range(self.count) for i in range(self.start, self.stop)]

    def take(self, whole: Any, dim: int = -2) -> Any:
        """These rows of `whole` along `dim` (negative): a view where they are one slice."""
        if self.count == 1:
            return whole.narrow(dim, self.start, self.stop - self.start)
        pieces = whole.unflatten(dim, (self.count, self.stride))
        return pieces.narrow(dim, self.start, self.stop - self.start).flatten(dim - 1, dim)

    def put(self, part: Any, dim: int = -2) -> Any:
        """`part` at these rows along `dim` (negative), zeros at the others."""
        outside = [0] * (2 * (-dim - 1)) + [self.start, self.stride - self.stop]
        if self.count == 1:
            return F.pad(part, outside)
        pieces = part.unflatten(dim, (self.count, self.stop - self.start))
        return F.pad(pieces, outside).flatten(dim - 1, dim)

    def replace(self, whole: Any, part: Any, dim: int = -2) -> Any:
        """`whole` with `part` at these rows along `dim` (negative)."""
        if self.count > 1:
            whole = whole.unflatten(dim, (self.count, self.stride))
            part = part.unflatten(dim, (self.count, self.stop - self.start))
        before, after = whole.narrow(dim, 0, self.start), whole.narrow(dim, self.stop, self.stride - self.stop)
        joined = torch.cat([before, part, after], dim=dim)
        return joined if self.count == 1 else joined.flatten(dim - 1, dim)


class LayerMap:
    """How a layer applies its weight.

    `channel` is the dimension of the layer's output that its rows lie along.  `biased`: a shift of the output can go
    to a bias; else it goes to the weight.  `reads_ids`: the input holds row numbers, no activations.
    """

    biased: ClassVar[bool] = True
    reads_ids: ClassVar[bool] = False
    channel: int = -1
    area: int = 1  # columns of the matrix that belong to one channel: the size of a convolution's kernel

    def matrix_shape(self, shape: Sequence[int]) -> Shape:
        """The shape (..., d_out, d_in) of `matrix` for a weight stored with `shape`."""
        raise NotImplementedError

    def matrix(self, weight: Any) -> Any:
        """A stored weight as the matrix (..., d_out, d_in); differentiable, a view where the weight is contiguous."""
        raise NotImplementedError

    def stored(self, matrix: Any, shape: Sequence[int]) -> Any:
        """A matrix as the layer stores it, with `shape`: the inverse of `matrix`."""
        raise NotImplementedError

    def shrink(self, x: Any, A: Any) -> Any:
        """The layer on its input x with A (r, d_in) in place of its weight, no bias: r channels in every group."""
        raise NotImplementedError

    def expand(self, h: Any, B: Any) -> Any:
        """B (d_out, r) on the channels of `shrink`, at every position: the channels of the layer's output."""
        raise NotImplementedError

    def product(self, x: Any, matrix: Any) -> Any:
        """The layer on its input x with that matrix (d_out, d_in) in place of its weight, and no bias."""
        raise NotImplementedError

    def outputs(self, rows: int) -> int:
        """How many channels the layer's output has, for a matrix of that many rows: the length of a bias."""
        return rows

    def inputs(self, shape: Sequence[int]) -> int:
        """How many channels the layer's input has, for a weight stored with `shape`."""
        return self.matrix_shape(shape)[-1]

    def scaled(self, weight: Any, scale: Any) -> Any:
        """A stored weight with every channel of the layer's output scaled: scale (outputs,)."""
        if weight.ndim == 1:  # a vector scales channels itself
            return weight * scale
        return self.stored(self.matrix(weight) * scale[:, None], weight.shape)

    def scaled_inputs(self, weight: Any, scale: Any) -> Any:
        """A stored weight with every channel of the layer's input scaled: scale (inputs,)."""
        return self.stored(self.matrix(weight) * scale, weight.shape)

    def broadcast(self, shift: Any) -> Any:
        """A shift (outputs,) so that it adds to the layer's output."""
        return shift


@dataclass(frozen=True)
class Matmul(LayerMap):
    """A linear layer, y = x W'; weight (..., d_out, d_in), or (..., d_in, d_out) where `transposed`.

    `shrink` and `expand` are for a single matrix; a stack of them (experts) is applied by whoever reads it.

    >>> Matmul(transposed=True).matrix(torch.ones(5, 7)).shape
    torch.Size([7, 5])
    """

    transposed: bool = False

    def matrix_shape(self, shape: Sequence[int]) -> Shape:
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else tuple(shape)

    def matrix(self, weight: Any) -> Any:
        if not self.transposed:
            return weight
        return weight.t() if weight.ndim == 2 else weight.transpose(-2, -1)

    def stored(self, matrix: Any, shape: Sequence[int]) -> Any:
        return self.matrix(matrix)

    def shrink(self, x: Any, A: Any) -> Any:
        return F.linear(x, A)

    def expand(self, h: Any, B: Any) -> Any:
        return F.linear(h, B)

    def product(self, x: Any, matrix: Any) -> Any:
        return F.linear(x, matrix)


LINEAR = Matmul()


@dataclass(frozen=True)
class Lookup(LayerMap):
    """An embedding, y = W[ids]: weight (d_in, d_out) with d_in the number of ids.

    `padding_idx` and `scale_grad_by_freq` only concern gradients, as in `torch.nn.Embedding`.  Not `max_norm`, which
    changes the weight when it is read.

    >>> Lookup().matrix(torch.ones(100, 8)).shape
    torch.Size([8, 100])
    """

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    biased = False
    reads_ids = True

    def matrix_shape(self, shape: Sequence[int]) -> Shape:
        return shape[1], shape[0]

    def matrix(self, weight: Any) -> Any:
        return weight.t()

    def stored(self, matrix: Any, shape: Sequence[int]) -> Any:
        return matrix.t()

    def shrink(self, x: Any, A: Any) -> Any:
        return F.embedding(x, A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def expand(self, h: Any, B: Any) -> Any:
        return F.linear(h, B)

    def product(self, x: Any, matrix: Any) -> Any:
        return self.shrink(x, matrix)


_CONVOLUTIONS: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Any]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Convolution(LayerMap):
    """A convolution over `len(kernel)` dimensions.

    The matrix of an ordinary one is its weight (out, in / groups, *kernel) flattened: d_out = out, and A stands in
    every group.  A transposed one stores (in, out / groups, *kernel): its matrix is (out / groups, in * prod(kernel)),
    and B stands in every group.

    >>> Convolution(kernel=(3,), padding=(1,), groups=2).matrix(torch.ones(8, 3, 3)).shape
    torch.Size([8, 9])
    """

    kernel: Shape
    stride: Shape = ()
    padding: Shape | str = ()
    dilation: Shape = ()
    groups: int = 1
    transposed: bool = False
    output_padding: Shape = ()
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        for name, default in (("stride", ones), ("padding", zeros), ("dilation", ones), ("output_padding", zeros)):
            object.__setattr__(self, name, getattr(self, name) or default)

    @property
    def channel(self) -> int:  # type: ignore[override]  # counted from the end: inputs may have no batch dimension
        return -len(self.kernel) - 1

    @property
    def area(self) -> int:  # type: ignore[override]
        return math.prod(self.kernel)

    def matrix_shape(self, shape: Sequence[int]) -> Shape:
        first, second, *kernel = shape
        return (second, first * math.prod(kernel)) if self.transposed else (first, second * math.prod(kernel))

    def matrix(self, weight: Any) -> Any:
        return weight.transpose(0, 1).flatten(1) if self.transposed else weight.flatten(1)

    def stored(self, matrix: Any, shape: Sequence[int]) -> Any:
        weight = matrix.unflatten(1, (-1, *self.kernel))
        return weight.transpose(0, 1) if self.transposed else weight

    def shrink(self, x: Any, A: Any) -> Any:
        everywhere = self.groups > 1 and not self.transposed
        return self.product(x, A.repeat(self.groups, 1) if everywhere else A)

    def product(self, x: Any, matrix: Any) -> Any:
        weight = self.stored(matrix, ())
        if self.transposed:
            return _TRANSPOSED[len(self.kernel)](
                x, weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._sides(), mode=self.padding_mode), 0
        return _CONVOLUTIONS[len(self.kernel)](x, weight, None, self.stride, padding, self.dilation, self.groups)

    def expand(self, h: Any, B: Any) -> Any:
        B = B.repeat(self.groups, 1) if self.transposed and self.groups > 1 else B
        weight = B.unflatten(1, (-1, *(1,) * len(self.kernel)))
        return _CONVOLUTIONS[len(self.kernel)](h, weight, None, groups=self.groups)

    def outputs(self, rows: int) -> int:
        return rows * self.groups if self.transposed else rows

    def inputs(self, shape: Sequence[int]) -> int:
        return shape[0] if self.transposed else shape[1] * self.groups

    def scaled(self, weight: Any, scale: Any) -> Any:
        if not self.transposed:
            return super().scaled(weight, scale)
        by_group = weight.unflatten(0, (self.groups, -1))  # (groups, in, out, *kernel)
        by = scale.view(self.groups, 1, -1, *(1,) * len(self.kernel))
        return (by_group * by).flatten(0, 1)

    def scaled_inputs(self, weight: Any, scale: Any) -> Any:
        if self.transposed:
            return weight * scale.view(-1, *(1,) * (len(self.kernel) + 1))
        by_group = weight.unflatten(0, (self.groups, -1))  # (groups, out, in, *kernel)
        by = scale.view(self.groups, 1, -1, *(1,) * len(self.kernel))
        return (by_group * by).flatten(0, 1)

    def broadcast(self, shift: Any) -> Any:
        return shift.unflatten(0, (-1, *(1,) * len(self.kernel)))

    def _sides(self) -> list[int]:
        """What `F.pad` takes: (before, after) of each dimension, the last one first."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            padding = (0,) * len(self.kernel) if isinstance(self.padding, str) else self.padding
            sides = [(p, p) for p in padding]
        return [side for pair in reversed(sides) for side in pair]
