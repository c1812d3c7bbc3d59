"""A series of cases on the command line: who takes part, how long, and where results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contest import WAYS, Contest, bars, lines, run
from harness import OURS, Deadline, Gate, Plan, about, headline, picture, settings, write
from profiles import profile

Results = Sequence[Mapping[str, Any]]


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """What every series takes."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    found.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    found.add_argument("--device", default="cuda" if gpu else "cpu")
    found.add_argument("--backend", default="inductor", help="of ours; aot_eager where there is no compiler")
    found.add_argument("--peers", nargs="+", default=(), metavar="NAME", help="contenders beside ours; all of them")
    found.add_argument("--without", nargs="+", default=(), metavar="NAME", help="contenders to leave out")
    found.add_argument("--ways", nargs="+", default=(), choices=WAYS)
    found.add_argument("--rounds", type=int, default=20)
    found.add_argument("--case-seconds", type=float, default=20.0, help="fewer rounds where a case takes longer")
    found.add_argument("--seconds", type=float, help="start no case after so many")
    found.add_argument("--out", type=Path, help="folder for NAME.json and NAME.png")
    found.add_argument("--name", default=name)
    found.add_argument("--profile", type=Path, metavar="FILE", help="write kernel tables of one step instead")
    return found


def parsed(found: argparse.ArgumentParser, small: Mapping[str, Any]) -> argparse.Namespace:
    """The command line, with `small` as the defaults where --small asks for them."""
    said = ", ".join(f"{name} {value}" for name, value in small.items())
    found.add_argument("--small", action="store_true", help=f"sizes for two cores, where nothing else is said: {said}")
    if found.parse_known_args()[0].small:
        found.set_defaults(**small)
    return found.parse_args()


def chosen(contest: Contest, wanted: Sequence[str], without: Sequence[str]) -> list[str]:
    """Names of contenders: those asked for, all where none are; ours is always there.

    A name that the case does not have is another case's: a series asks for all of its peers at once.
    """
    names = [n for n in contest.builders if not wanted or n == OURS or n in wanted]
    return [n for n in names if n not in without]


def ways(contest: Contest, tokens: int, wanted: Sequence[str]) -> list[str]:
    """How a case is timed: replays too where a step is short and on a GPU."""
    graphs = contest.case.device.type == "cuda" and tokens <= 512
    return list(wanted) or (["step", "replay"] if graphs else ["step"])


def series(
    contests: Iterable[Contest],
    args: argparse.Namespace,
    totals: Callable[[Results], dict[str, Any]],
) -> dict[str, Any]:
    """Measure every case, printing each and writing all that there is after each; `totals` go beside the results."""
    torch.backends.cuda.matmul.allow_tf32 = False
    deadline, gate, plan = Deadline(args.seconds), Gate(), Plan(args.rounds, seconds=args.case_seconds)
    data: dict[str, Any] = {"about": about(torch.device(args.device)), "arguments": {}, "results": [], "left out": []}
    data["arguments"] = settings(args)
    print(headline(data["about"]), flush=True)
    file = args.out / f"{args.name}.json" if args.out else None
    for contest in contests:
        if deadline.passed:
            data["left out"].append(str(contest.case))
            continue
        names = chosen(contest, args.peers, args.without)
        if args.profile:
            profile(contest, names, args.profile, gate)
            continue
        tokens = int(contest.case.described()["tokens"])
        result = run(contest, names, ways(contest, tokens, args.ways), plan, gate)
        data["results"].append(result)
        data |= totals(data["results"])
        print(f"\n{contest.case}", *lines(result), sep="\n", flush=True)
        if file:
            write(file, data)
    if data["left out"]:
        print("\nno time was left for: " + "; ".join(data["left out"]))
    if file:
        write(file, data)
        picture(file.with_suffix(".png"), "a step", bars(data["results"]))
    return data
