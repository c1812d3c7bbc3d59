"""The Walsh-Hadamard transform against the matrix in float64."""

import pytest
import torch

from rewrite.codegen.forms import Walsh
from rewrite.codegen.kernels import walsh


def matrix(d_out, d_in, device):
    """Row i, column j: the sign of the number of bits that i and j share."""
    shared = torch.arange(d_out)[:, None] & torch.arange(d_in)[None, :]
    odd = torch.zeros_like(shared)
    for bit in range(20):
        odd ^= (shared >> bit) & 1
    size = 2 ** ((max(d_out, d_in) - 1).bit_length())
    return ((1 - 2 * odd).double() / size**0.5).to(device)


def close(found, exact, x, dtype):
    """One rounding to `dtype`; half precision keeps 16 bits between the two factors, float32 all."""
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
    bound = bound + (2**-16 if dtype.itemsize == 2 else 1e-6) * x.double().norm(dim=-1, keepdim=True)
    assert found.dtype == dtype
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(
    ("d_in", "d_out"), [(1, 1), (2, 2), (5, 7), (16, 16), (100, 128), (128, 3), (200, 256), (256, 130), (400, 500)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transform(d_in, d_out, dtype, device):
    for lead in ((1,), (3, 3), (0,), ()):
        x = (torch.randn(*lead, d_in, device=device) * 3).to(dtype)
        assert walsh.supports(x, d_out) is None
        y = walsh.walsh(x, d_out)
        assert y.shape == (*lead, d_out)
        close(y, x.double() @ matrix(d_out, d_in, device).T, x, dtype)


def test_of_many_rows_and_columns(device):
    for rows, size in ((70, 32), (17, 512), (2, 4096), (1, 8192)):
        x = torch.randn(rows, size, device=device).bfloat16()
        close(walsh.walsh(x, size), Walsh(size, size, x).apply(x.double()), x, torch.bfloat16)


def test_large_and_small_numbers_keep_their_bits(device):
    """float32 is split without a loss: its own inverse to a rounding, over 60 orders of magnitude between rows."""
    x = torch.randn(7, 256, device=device) * 10.0 ** torch.arange(-30, 40, 10, device=device)[:, None]
    back = walsh.walsh(walsh.walsh(x, 256), 256)
    assert bool(((back - x).double().norm(dim=-1) <= 1e-6 * x.double().norm(dim=-1)).all())  # squares need the range


def test_rows_that_are_not_contiguous(device):
    wide = torch.randn(5, 600, device=device)
    for x in (wide[:, :300], wide[:, ::2], wide.t()[:40].t(), wide.view(5, 2, 300).transpose(0, 1)):
        assert torch.equal(walsh.walsh(x, x.shape[-1]), walsh.walsh(x.contiguous(), x.shape[-1]))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_what_is_not_finite_stays_in_its_row(device):
    x = torch.randn(3, 300, device=device)
    x[1, 17] = torch.inf
    y = walsh.walsh(x, 300)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], walsh.walsh(x[::2], 300))


def test_what_has_no_kernel(device):
    assert walsh.supports(torch.zeros(2, 8, dtype=torch.float64, device=device), 8) == "no kernel for torch.float64"
    wide = torch.zeros(2, 5000, device=device)
    assert walsh.supports(wide, 8) == "2^13 numbers of torch.float32 are more than a program holds"
    assert walsh.supports(wide.bfloat16(), 8) is None


@pytest.mark.gpu
@pytest.mark.parametrize("size", [4096, 5120])
def test_form_at_the_sizes_of_a_model(size):
    x = torch.randn(2, 517, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = Walsh(4096, size, x).apply(x)
    W = Walsh(4096, size, x)
    close(y, W.apply(x.detach().double()), x.detach(), torch.bfloat16)
    dy = torch.randn_like(y)
    y.backward(dy)
    close(x.grad, W.T.apply(dy.double()), dy, torch.bfloat16)
