"""Nonlinearities that store their derivative: exact forwards, levels within half a step, ReLU exact in one bit."""

from __future__ import annotations

import pytest
import torch

import rewrite.codegen.ops  # noqa: F401  (defines torch.ops.rewrite)
from rewrite.codegen.activations import NONLINEARITIES, bytes_of_derivative, coarse_activation

SLOPE = 0.1


def slopes(name: str, bits: int | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, derivative) of a nonlinearity as it is, or with its derivative in so many bits."""
    x = x.clone().requires_grad_(True)
    if bits is None:
        y = NONLINEARITIES[name].function(x, SLOPE)
    else:
        y = torch.ops.rewrite.coarse_activation(x, name, bits, SLOPE)
    (found,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(NONLINEARITIES))
def test_the_function_is_exact_and_its_derivative_near(name: str, dtype: torch.dtype):
    f, x = NONLINEARITIES[name], torch.linspace(-12, 12, 4001, dtype=torch.float64)[None].to(dtype)
    y, exact = slopes(name, None, x)
    bits = f.bits(4, approximate=True)
    assert bits == (1 if f.slopes else 4)
    z, found = slopes(name, bits, x)
    assert torch.equal(y, z)
    bound = 0 if f.slopes else 0.5 / f.unit
    assert float((found.double() - exact.double()).abs().max()) <= bound + torch.finfo(dtype).eps
    flat = x.double().abs() > 11  # where a function is flat or straight, its derivative is a level
    assert torch.equal(found[flat], exact[flat].double().mul(f.unit).round().div(f.unit).to(dtype)) or f.slopes


@pytest.mark.parametrize("name", sorted(NONLINEARITIES))
def test_one_bit(name: str):
    f, x = NONLINEARITIES[name], torch.linspace(-3, 3, 77, dtype=torch.float64).view(7, 11)
    assert f.bits(1, approximate=False) == (1 if f.slopes else None)
    if f.bits(1, approximate=True) is None:
        assert not f.step
        return
    y, exact = slopes(name, None, x)
    z, found = slopes(name, 1, x)
    assert torch.equal(y, z)
    assert torch.equal(found, exact if f.slopes else (x > 0).double())


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 7), (1, 1), (4,), (0, 6)], ids=str)
@pytest.mark.parametrize(("name", "bits"), [("relu", 1), ("silu", 4), ("silu", 1)])
def test_odd_sizes_and_bytes(name: str, bits: int, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = coarse_activation(x, name, bits, 0.0)
    assert sum(t.nbytes for t in kept) == bytes_of_derivative(shape, bits)
    (found,) = torch.autograd.grad(y.sum(), x)
    flat = (
        torch.cat([slopes(name, bits, row)[1] for row in x.detach().reshape(-1, 1)]) if x.numel() else found.flatten()
    )
    assert torch.equal(found.flatten(), flat)


@pytest.mark.parametrize(("name", "bits"), [("silu", 4), pytest.param("relu", 1, marks=pytest.mark.slow)])
def test_inductor_computes_the_same(name: str, bits: int):
    x = torch.randn(3, 41, generator=torch.Generator().manual_seed(0))
    expected = slopes(name, bits, x)[1]
    x.requires_grad_(True)
    y = torch.compile(lambda x: torch.ops.rewrite.coarse_activation(x, name, bits, 0.0), dynamic=False)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
