"""Kernels of the activation codecs, bit for bit the reference in `codegen.codecs`."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rewrite.codegen.codecs import CODECS
from rewrite.codegen.kernels import codecs

# What is not finite is part of the tests; the interpreter is numpy, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every = pytest.mark.parametrize(("name", "group"), [("fp8", 128), ("int8", 128), ("fp8", 12), ("int8", 12)])


def bits(t):
    return t.contiguous().flatten().view(torch.uint8)


def same(found, expected):
    """Whether values are equal to the bit; a NaN is as good as another."""
    numbers = ~expected.isnan()
    return torch.equal(found.isnan(), ~numbers) and torch.equal(bits(found[numbers]), bits(expected[numbers]))


def encoded(x, name, group):
    """What the kernel makes of x, after a check against the reference."""
    expected = CODECS[name](group).encode(x)
    found = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in expected)
    codecs.encode(x, name, group, *found)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(bits(one), bits(other))
    return found


def check(x, name, group):
    """Both ways; the decoded values."""
    codes, scales = encoded(x, name, group)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codecs.decode(codes, scales, name, group, out)
    assert same(out, CODECS[name](group).decode((codes, scales), x.dtype))
    return out


@every
def test_the_reference_divides_by_no_number(name, group):
    """Which CUDA and Inductor do as a product with its reciprocal, a CPU does not; tensors all divide alike."""
    graph = make_fx(lambda x: CODECS[name](group).encode(x))(torch.randn(3, 130)).graph
    divisions = [node for node in graph.nodes if str(node.target).startswith("aten.div.")]
    assert divisions
    assert all(isinstance(each, torch.fx.Node) for node in divisions for each in node.args[:2])


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 512), (3, 130), (2, 5, 7), (2, 3, 1), (9,), (0, 8), (3, 0), (33, 97)], ids=str)
def test_shapes(name, group, dtype, shape, device):
    check((torch.randn(shape, device=device) * 3).to(dtype), name, group)


@every
def test_every_half_precision_value(name, group, device):
    """All 65,536 bit patterns of both dtypes, alone in their group beside 1 and among their neighbours."""
    patterns = torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = patterns.view(dtype)
        check(x.view(512, 128), name, group)
        check(torch.stack([x, torch.ones_like(x)], dim=-1), name, group)


@every
def test_magnitudes_and_ties(name, group, device):
    exponents = torch.linspace(-149, 127, 97, device=device)[:, None]
    check(torch.randn(97, 256, device=device) * exponents.exp2(), name, group)
    # Halves of the steps of both codecs: whole numbers and a half, and 4 bits of mantissa.
    ties = torch.cat([torch.arange(-127, 127, device=device) + 0.5, torch.tensor([127.0], device=device)])
    check(ties[None], name, group)
    steps = torch.arange(16, 32, device=device)[None, :] * torch.arange(-16.0, 4, device=device).exp2()[:, None]
    check(torch.cat([steps, -steps, steps.new_full((20, 1), 240.0)], dim=-1), name, group)


@every
def test_values_that_are_not_finite(name, group, device):
    x = torch.tensor(
        [[0.0, 0, -0.0, 0], [torch.nan, 1, torch.inf, -2], [1e-40, 0, -0.0, 1e-43], [3e38, 1, -3e38, 0]], device=device
    )
    negative = torch.tensor(-0x400000, dtype=torch.int32, device=device).view(torch.float32)  # a NaN with its sign
    x = torch.cat([x, torch.full((1, 4), torch.nan, device=device), negative.expand(1, 4)])
    assert torch.equal(check(x, name, group).isnan(), ~x.isfinite())


@every
def test_every_code(name, group, device):
    kind = CODECS[name](group)
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(kind.code)
    for dtype in DTYPES:
        count = -(-256 // kind.size(256))
        scales = (torch.arange(count, device=device) * 9 + 97).to(kind.scale_dtype(dtype))
        out = torch.empty(256, dtype=dtype, device=device)
        codecs.decode(codes, scales, name, group, out)
        assert same(out, kind.decode((codes, scales), dtype))


@every
def test_values_that_are_not_contiguous(name, group, device):
    x = torch.randn(9, 6, 40, device=device)
    for view in (x.transpose(0, 2), x[:, ::2, 3:], x.expand(2, 9, 6, 40)):
        check(view, name, group)


def test_what_has_no_kernel(device):
    assert codecs.supports("fp8", 128, 512, torch.bfloat16, device) is None
    assert codecs.supports("fp8", 4096, 512, torch.bfloat16, device) is None
    assert codecs.supports("fp8", 4096, 8192, torch.bfloat16, device) == "groups of 4096 are longer than 2048"
    assert codecs.supports("int8", 128, 512, torch.float64, device) == "no kernel for torch.float64"
    assert codecs.supports("int4", 128, 512, torch.bfloat16, device) == "no kernel for the codec int4"


@pytest.mark.gpu
@every
def test_operators_at_the_sizes_of_a_model(name, group):
    x = torch.randn(2, 1031, 4096, device="cuda", dtype=torch.bfloat16)
    stored = torch.ops.rewrite.encode_saved(x, name, group)
    expected = CODECS[name](group).encode(x)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(stored, expected, strict=True))
    out = torch.ops.rewrite.decode_saved(*stored, name, group, x.dtype)
    assert same(out, CODECS[name](group).decode(expected, x.dtype))
