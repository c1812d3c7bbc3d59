"""Single operators: each of ours beside what the libraries offer for the same thing, in interleaved pairs.

    python benchmarks/operators.py                              # on a GPU where there is one
    python benchmarks/operators.py --rows nf4_decode --out results

A row is a function with the mark `@row`: it takes the arguments of the command line and yields operations.  To add
one, write such a function; nothing else knows of it.  Inputs take turns, so that no cache serves them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest import bars
from harness import (
    OURS,
    Deadline,
    Gate,
    Plan,
    about,
    error,
    headline,
    measure,
    picture,
    ratios,
    release,
    said,
    spread,
    write,
)
from layers import BOUNDS, CACHE

from rewrite.codegen import nf4
from rewrite.codegen.storage import Nf4
from rewrite.table import duration, table

Tensor = torch.Tensor
Run = Callable[[int], Tensor]
"""Computes the operation on the k-th set of inputs."""
ops = torch.ops.rewrite


@dataclass(frozen=True)
class Operation:
    """One operation at one size, on several sets of inputs.

    `expected` is the first set's result in float64 and `bound` the largest relative error, but for `floors`, which
    compute something else and are here for their time; `bytes` and `flops` are what it takes at least.  A contender is
    built when its turn comes, and may fail to be: it is named with its error.
    """

    name: str
    expected: Callable[[], Tensor]
    contenders: Mapping[str, Callable[[], Run]]
    bound: float
    floors: tuple[str, ...] = ()
    bytes: float = 0.0
    flops: float = 0.0


Row = Callable[[argparse.Namespace], Iterator[Operation]]
ROWS: dict[str, Row] = {}


def row(make: Row) -> Row:
    """Add the operations of a function to the benchmark, by its name."""
    ROWS[getattr(make, "__name__", "")] = make
    return make


class Stored:
    """Weights (n, k) in NF4 with quantised absmax, as many as no cache holds, for us and for bitsandbytes."""

    def __init__(self, n: int, k: int, args: argparse.Namespace) -> None:
        dtype, device = getattr(torch, args.dtype), torch.device(args.device)
        count = min(20, math.ceil(CACHE[device.type] / (n * k / 2)))
        self.dense = [torch.randn(n, k, device=device).mul_(k**-0.5).to(dtype) for _ in range(count)]
        self.layout = str(Nf4((n, k), dtype))
        self.held = [nf4.Nf4Tensors.from_weight(W, 64, double_quant=True) for W in self.dense]
        self.first = self.held[0].dequantize().double()
        self.bytes = n * k * nf4.bytes_per_weight(64, True)

    def ours(self, k: int) -> list[Tensor]:
        held = self.held[k % len(self.held)]
        assert held.nested is not None
        return [held.codes, held.absmax, held.nested.absmax, held.nested.code, held.nested.offset]

    def theirs(self) -> list[tuple[Tensor, Any]]:
        from bitsandbytes.functional import quantize_4bit

        return [quantize_4bit(W, compress_statistics=True, quant_type="nf4") for W in self.dense]

    def turn(self, k: int) -> Tensor:
        return self.dense[k % len(self.dense)]


@row
def nf4_decode(args: argparse.Namespace) -> Iterator[Operation]:
    """A weight decoded, beside a copy of it."""

    def theirs(stored: Stored) -> Run:
        from bitsandbytes.functional import dequantize_4bit

        held = stored.theirs()
        return lambda k: dequantize_4bit(*held[k % len(held)])

    for n, k in ((4096, 4096), (14336, 4096)):
        stored = Stored(n // args.shrink, k // args.shrink, args)
        contenders = {
            OURS: lambda s=stored: lambda i: ops.decode(s.ours(i), s.layout),
            "bitsandbytes": lambda s=stored: theirs(s),
            "copy": lambda s=stored: lambda i: s.turn(i).clone(),
        }
        size = stored.bytes + stored.dense[0].nbytes
        # Quantising the absmax anew, bitsandbytes comes to other codes for one in a thousand of them.
        yield Operation(f"nf4 decode {n}x{k}", lambda s=stored: s.first, contenders, 2e-3, ("copy",), size)


@row
def nf4_linear(args: argparse.Namespace) -> Iterator[Operation]:
    """x W' with W in NF4."""
    yield from _products(args, "x W'", lambda x, W: F.linear(x, W), _our_linear, False)


@row
def nf4_input_gradient(args: argparse.Namespace) -> Iterator[Operation]:
    """dy W with W in NF4."""
    yield from _products(args, "dy W", lambda dy, W: dy @ W, _our_gradient, True)


def _our_linear(x: Tensor, stored: Stored, k: int) -> Tensor:
    return ops.adapted_linear_core(x, stored.ours(k), stored.layout, None, [], [], [], [], [])


def _our_gradient(dy: Tensor, stored: Stored, k: int) -> Tensor:
    return ops.linear_input_gradient(dy, stored.ours(k), stored.layout)


def _products(
    args: argparse.Namespace,
    name: str,
    dense: Callable[[Tensor, Tensor], Tensor],
    ours: Callable[[Tensor, Stored, int], Tensor],
    backward: bool,
) -> Iterator[Operation]:
    def theirs(x: Tensor) -> Run:
        from bitsandbytes.autograd._functions import matmul_4bit
        from bitsandbytes.functional import dequantize_4bit

        held = stored.theirs()
        if backward:
            return lambda i: x @ dequantize_4bit(*held[i % len(held)])
        return lambda i: matmul_4bit(x, *_transposed(held[i % len(held)]))

    n = k = 4096 // args.shrink
    stored = Stored(n, k, args)
    for tokens in args.tokens:
        x = torch.randn(tokens, k, device=args.device).to(stored.dense[0].dtype)
        contenders = {
            OURS: lambda x=x: lambda i: ours(x, stored, i),
            "bitsandbytes": lambda x=x: theirs(x),
            "dense": lambda x=x: lambda i: dense(x, stored.turn(i)),
        }
        expected = lambda x=x: dense(x.double(), stored.first)  # noqa: E731
        called, bound, flops = f"nf4 {name} {tokens} tokens {n}x{k}", BOUNDS[x.dtype], 2.0 * tokens * n * k
        yield Operation(called, expected, contenders, bound, ("dense",), stored.bytes, flops)


def _transposed(held: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return held[0].t(), held[1]


@row
def adapted_linear(args: argparse.Namespace) -> Iterator[Operation]:
    """x W' + s h B' with h given, beside the base product alone and beside two products and an addition."""
    dtype, device, rank = getattr(torch, args.dtype), args.device, 16
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        n, k = n // args.shrink, k // args.shrink
        W, B = (torch.randn(n, m, device=device).mul_(m**-0.5).to(dtype) for m in (k, rank))
        for tokens in args.tokens:
            x, h = (torch.randn(tokens, m, device=device).to(dtype) for m in (k, rank))
            contenders = {
                OURS: lambda x=x, h=h, W=W, B=B: (
                    lambda _: ops.adapted_linear_core(x, [W], "dense", None, [h], [B], [2.0], [0], [])
                ),
                "addmm in place": lambda x=x, h=h, W=W, B=B: lambda _: (x @ W.t()).addmm_(h, B.t(), alpha=2.0),
                "as PEFT has it": lambda x=x, h=h, W=W, B=B: lambda _: F.linear(x, W) + F.linear(h, B) * 2.0,
            }
            expected = lambda x=x, h=h, W=W, B=B: (  # noqa: E731
                x.double() @ W.double().t() + 2 * h.double() @ B.double().t()
            )
            flops, size = 2.0 * tokens * n * (k + rank), x.nbytes + W.nbytes + tokens * n * dtype.itemsize
            yield Operation(f"adapted {k}->{n} {tokens} tokens", expected, contenders, BOUNDS[dtype], (), size, flops)


def run(operation: Operation, device: torch.device, plan: Plan, gate: Gate) -> dict[str, Any]:
    """Everything about an operation, for a result."""
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Run] = {}
    with gate.preparing():
        expected = operation.expected()
        for name, build in operation.contenders.items():
            try:
                step = build()
                found = error([step(0)], [expected])
                rows[name] = {"error": found, "passed": name in operation.floors or found <= operation.bound}
                steps[name] = step
            except Exception as failure:  # named, not absent
                rows[name] = {"failure": said(failure)}
    with gate.measuring():
        times = measure(steps, device, plan)
    for name, values in times.items():
        took = spread(values)
        rows[name] |= {"seconds": took, "bytes_a_second": operation.bytes / took["median"]}
        rows[name]["flops_a_second"] = operation.flops / took["median"]
    found = {
        "case": {"operation": operation.name},
        "bytes": operation.bytes,
        "flops": operation.flops,
        "bound": operation.bound,
    }
    return {**found, "rows": rows, "ratios": {"step": {"over ours": ratios(times, OURS)}}}


def lines(result: Mapping[str, Any]) -> list[str]:
    """An operation as a table."""
    rows: list[tuple[str, ...]] = [("", "time", "over ours", "quartiles", "GB/s", "TFLOP/s", "error")]
    for name, found in result["rows"].items():
        if found.get("failure"):
            rows.append((name, found["failure"][:90], "", "", "", "", ""))
            continue
        pair = result["ratios"]["step"]["over ours"].get(name)
        shown = (f"{pair['median']:.3f}", f"{pair['low']:.3f} .. {pair['high']:.3f}") if pair else ("", "")
        rates = (f"{found['bytes_a_second'] / 1e9:.0f}", f"{found['flops_a_second'] / 1e12:.2f}")
        wrong = f"{found['error']:.1e}" + ("" if found["passed"] else " FAILED")
        rows.append((name, duration(found["seconds"]["median"]), *shown, *rates, wrong))
    return table(rows, right={2, 4, 5})


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    device, deadline, gate = torch.device(args.device), Deadline(args.seconds), Gate()
    plan = Plan(args.rounds, seconds=args.case_seconds)
    data: dict[str, Any] = {"about": about(device), "results": []}
    print(headline(data["about"]), flush=True)
    file = args.out / f"{args.name}.json" if args.out else None
    for name in args.rows:
        with torch.no_grad():
            for operation in ROWS[name](args):
                if deadline.passed:
                    break
                data["results"].append(run(operation, device, plan, gate))
                print(f"\n{operation.name}", *lines(data["results"][-1]), sep="\n", flush=True)
                if file:
                    write(file, data)
        release(device)
    if file:
        picture(file.with_suffix(".png"), "one call", bars(data["results"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 512, 2048, 8192] if gpu else [1, 8, 512]
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--shrink", type=int, default=1, help="divide every size by this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--case-seconds", type=float, default=3.0, help="fewer rounds where one takes longer")
    parser.add_argument("--seconds", type=float, help="start none after so many")
    parser.add_argument("--out", type=Path, help="folder for NAME.json and NAME.png")
    parser.add_argument("--name", default="operators")
    return parser.parse_args()


if __name__ == "__main__":
    main()
