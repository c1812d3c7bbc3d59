"""NF4 on a CPU: a linear layer of 4096 x 4096, and QLoRA steps of a small Llama, beside bitsandbytes and PEFT.

    python benchmarks/nf4_cpu.py                              # a few minutes on two cores
    python benchmarks/nf4_cpu.py --tokens 1 8 --model-tokens --out results
    REWRITE_CPU_KERNELS=0 python benchmarks/nf4_cpu.py        # the same without our C++ kernels

A step is forward and backward, to the inputs and to what is trained.  What is measured, and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import linears
import steps
import torch
from contest import Contest
from layers import Case
from models import ModelCase
from series import parser, series

from rewrite.codegen.cpu import nf4

PEERS = ("bitsandbytes, frozen", "peft + bitsandbytes", "peft + bitsandbytes, compiled", "base")


def contests(args: argparse.Namespace) -> Iterator[Contest]:
    """The frozen layer by tokens, then the model by tokens."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    sizes = (dtype, device, args.shrink, args.backend)
    for tokens in args.tokens:
        yield linears.contest(Case("nf4", "q,o", tokens, 0, *sizes))
    for tokens in args.model_tokens:
        yield steps.contest(ModelCase("qlora", "small", tokens, args.rank, *sizes))


def main() -> None:
    args = arguments()
    series(contests(args), args, lambda _: {"nf4 on the CPU": nf4.route()})


def arguments() -> argparse.Namespace:
    found = parser(__doc__, "nf4_cpu")
    found.set_defaults(device="cpu", dtype="bfloat16", peers=PEERS)
    found.add_argument("--tokens", type=int, nargs="*", default=(1, 8, 32, 128, 512), help="of the linear layer")
    found.add_argument("--model-tokens", type=int, nargs="*", default=(32, 256, 512), help="of the model")
    found.add_argument("--rank", type=int, default=16)
    found.add_argument("--shrink", type=int, default=1, help="divide every size by this")
    return found.parse_args()


if __name__ == "__main__":
    main()
