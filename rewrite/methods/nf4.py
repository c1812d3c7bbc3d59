"""NF4: the frozen weight in 4 bits.  Codes, absmax and decoded values are those of bitsandbytes, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewrite.codegen import bitsandbytes_format, nf4, storage
from rewrite.errors import RewriteError
from rewrite.method import Method, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Nf4(Method):
    """W  ->  decode(nf4 codes, absmax per block)  (Dettmers et al. 2023)"""

    block: int = arg(64, low=32, high=4096, help="weights per absmax, a power of two")
    double_quant: bool = arg(False, help="quantise the absmax values too: 0.516 instead of 0.563 bytes a weight")

    kinds = frozenset({"linear", "expert"})
    positional_sites = True
    default_sites = "base"
    paper = "https://arxiv.org/abs/2305.14314"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return None if self.block & (self.block - 1) == 0 else f"block must be a power of two, got {self.block}"

    def encode(self, W: Tensor) -> tuple[Tensor, ...]:
        codes, absmax = nf4.quantize(W, self.block)
        if not self.double_quant:
            return codes, absmax
        codes2, nested, offset = nf4.quantize_absmax(absmax)
        return codes, codes2, nested, nf4.dynamic_map().to(absmax.device), offset

    def layout(self, site: Site) -> storage.Nf4:
        return storage.Nf4((*site.leading, site.out_features, site.in_features), site.dtype, self.block)

    def read(self, state: Mapping[str, Any], name: str) -> tuple[Tensor, ...] | None:
        if name not in bitsandbytes_format.names(state):
            return None
        found = bitsandbytes_format.read(state, name)
        if found.blocksize != self.block or (self.double_quant and found.nested is None):
            written = f"nf4(block={found.blocksize}, double_quant={str(found.nested is not None).lower()})"
            raise RewriteError(f"{name} was quantised as {written}, this model stores it as {self}: attach with that")
        if self.double_quant and found.nested is not None:
            return found.codes, found.absmax, found.nested.absmax, found.nested.code, found.nested.offset
        return found.codes, found.scales()
