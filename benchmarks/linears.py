"""Linear layers of Llama-3-8B under every method: rewrite, and the peers that install, in interleaved pairs.

    python benchmarks/linears.py                              # the matrix; on a GPU where there is one
    python benchmarks/linears.py --small                      # sizes for two cores
    python benchmarks/linears.py --methods qlora --tokens 128 2048 --shapes layer --out results
    python benchmarks/linears.py --methods lora --tokens 8192 --profile results/profile.txt

A step is forward and backward to the inputs and to what is trained.  Every timing stands beside its numerics: relative
errors of y, dx and every gradient against float64.  What is measured, and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import run
from harness import OURS, Deadline, Gate, Plan, about, headline, picture, write
from layers import IN_A_LAYER, LAYER, METHODS, SHAPES, Case
from peers import for_method
from profiles import profile

from rewrite.table import duration, size, table

TOKENS, RANKS = (1, 32, 128, 512, 2048, 8192), (8, 16, 64)
WAYS = ("step", "replay", "forward")


def cases(args: argparse.Namespace) -> list[Case]:
    """The matrix, methods outermost: one rank but for LoRA, whose cost is asked for by rank."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    found: list[Case] = []
    for method in args.methods:
        for tokens in args.tokens:
            for shape in args.shapes:
                ranks = args.ranks if method == "lora" else args.ranks[:1]
                found += [Case(method, shape, tokens, rank, dtype, device, args.shrink) for rank in ranks]
    return found


def chosen(case: Case, wanted: Sequence[str], without: Sequence[str]) -> list[str]:
    """Names of contenders: those asked for, all where none are; ours is always there."""
    names = list(for_method(case))
    if wanted:
        names = [n for n in names if n == OURS or n in wanted]
    return [n for n in names if n not in without]


def lines(result: Mapping[str, Any]) -> list[str]:
    """A case as a table: time, ratio to ours with its quartiles, memory, largest error."""
    rows = [("", "way", "time", "over ours", "quartiles", "saved", "peak", "largest error")]
    for name, row in result["rows"].items():
        if row.get("failure"):
            rows.append((name, "", row["failure"][:90], "", "", "", "", ""))
            continue
        worst = max(row["check"], key=row["check"].get)
        wrong = f"{row['check'][worst]:.1e} {worst}" + ("" if row["passed"] else " FAILED")
        memory = size(row["memory"]["peak_bytes"]) if row.get("memory") else ""
        for way, time in row["times"].items():
            ratio = result["ratios"][way]["over ours"].get(name)
            pair = (f"{ratio['median']:.3f}", f"{ratio['low']:.3f} .. {ratio['high']:.3f}") if ratio else ("", "")
            rows.append((name, way, duration(time["median"]), *pair, size(row["saved_bytes"]), memory, wrong))
        rows += [(name, way, text[:90], "", "", "", "", "") for way, text in row.get("failures", {}).items()]
    return table(rows, right={3})


def summed(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Times of single shapes weighted over a decoder layer, where all of them were measured."""
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        case = result["case"]
        if case["shape"] in SHAPES:
            key = tuple(case[name] for name in ("method", "tokens", "rank", "dtype"))
            groups.setdefault(key, {})[case["shape"]] = result
    found: list[dict[str, Any]] = []
    for (method, tokens, rank, _), by_shape in groups.items():
        if by_shape.keys() != SHAPES.keys():
            continue
        times: dict[str, float] = {}
        for name in by_shape["down"]["rows"]:
            parts = [_each(by_shape[shape], name, count) for shape, count in IN_A_LAYER.items()]
            if all(part is not None for part in parts):
                times[name] = sum(part for part in parts if part is not None)
        found.append({"method": method, "tokens": tokens, "rank": rank, "seconds": times})
    return found


def _each(result: Mapping[str, Any], name: str, count: int) -> float | None:
    time = result["rows"].get(name, {}).get("times", {}).get("step")
    return None if time is None else time["median"] / result["case"]["linears"] * count


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    deadline, gate, plan = Deadline(args.seconds), Gate(), Plan(args.rounds, seconds=args.case_seconds)
    data: dict[str, Any] = {"about": about(torch.device(args.device)), "results": [], "left out": []}
    print(headline(data["about"]), flush=True)
    file = args.out / f"{args.name}.json" if args.out else None
    for case in cases(args):
        if deadline.passed:
            data["left out"].append(str(case))
            continue
        names = chosen(case, args.peers, args.without)
        if args.profile:
            profile(case, names, args.profile)
            continue
        result = run(case, names, ways(case, args.ways), plan, gate)
        data["results"].append(result)
        data["over a layer"] = summed(data["results"])
        print(f"\n{case}", *lines(result), sep="\n", flush=True)
        if file:
            write(file, data)
    if data["left out"]:
        print("\nno time was left for: " + "; ".join(data["left out"]))
    if file:
        write(file, data)
        picture(file.with_suffix(".png"), "a step", bars(data["results"]))


def ways(case: Case, wanted: Sequence[str]) -> list[str]:
    """How a case is timed: replays where a step is short and on a GPU."""
    graphs = case.device.type == "cuda" and case.tokens <= 512
    return list(wanted) or (["step", "replay"] if graphs else ["step"])


def bars(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the picture shows: the ratios of steps to ours."""
    found: dict[str, Any] = {}
    for result in results:
        case, ratios = result["case"], result["ratios"].get("step", {}).get("over ours", {})
        found[f"{case['method']}, {case['shape']}, {case['tokens']} tokens, r {case['rank']}"] = ratios
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shapes", nargs="+", default=[LAYER, *SHAPES], choices=[LAYER, *SHAPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of LoRA; others take the first")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--shrink", type=int, default=1, help="divide every size by this")
    parser.add_argument("--small", action="store_true", help="an eighth of the sizes, three numbers of tokens, rank 8")
    parser.add_argument("--peers", nargs="+", default=(), metavar="NAME", help="contenders beside ours; all of them")
    parser.add_argument("--without", nargs="+", default=(), metavar="NAME", help="contenders to leave out")
    parser.add_argument("--ways", nargs="+", default=(), choices=WAYS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--case-seconds", type=float, default=20.0, help="fewer rounds where a case takes longer")
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument("--out", type=Path, help="folder for NAME.json and NAME.png")
    parser.add_argument("--name", default="linears")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write kernel tables of one step instead")
    args = parser.parse_args()
    if args.small:
        args.shrink, args.tokens, args.ranks = 8, (1, 32, 128), (8,)
    return args


if __name__ == "__main__":
    main()
