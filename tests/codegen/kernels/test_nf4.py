"""NF4 kernels against `codegen.nf4`."""

import pytest
import torch

from rewrite.codegen import nf4
from rewrite.codegen.kernels.nf4 import Nf4Dequantise


@pytest.mark.parametrize("shape", [(37, 91), (1, 1), (64, 128)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantises_bit_for_bit(shape, nested, dtype, device):
    packed = nf4.Nf4Tensors.from_weight(torch.randn(shape, device=device), 64, nested)
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    scales = [packed.nested.absmax, packed.nested.code, packed.nested.offset] if nested else []
    Nf4Dequantise(out.numel(), 64, nested, dtype).launch(packed.codes, packed.absmax, *scales, out)
    assert torch.equal(out, packed.dequantize(dtype))
