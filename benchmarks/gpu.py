"""Everything that one GPU can answer in a few minutes; `benchmarks/gpu.sh` runs it.

    benchmarks/gpu.sh [FOLDER]              # writes gpu.json, gpu.png, targets.txt, gpu.log
    benchmarks/gpu.sh FOLDER --budget 300 --parts lora qlora --profile

Parts run in waves, most important first, each in a process of its own: a crash loses its part alone.  Those of one
wave compile beside one another, and take turns on the device when they measure.  A wave has a share of the seconds;
what has not ended by then is stopped.  What was measured up to any moment is in the folder: nothing is lost by a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contest import bars
from harness import Deadline, picture, write
from targets import judged

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SMALL = "--device cpu --dtype float32 --shrink 64 --tokens 4 --rounds 2 --case-seconds 0.1".split()
"""What a dry run adds: the same parts, as small as they go."""
LAST = 8.0
"""Seconds that stay for the picture and the table."""


@dataclass(frozen=True)
class Part:
    """One process: a script of this folder and its arguments; `wave` says when, 0 first."""

    name: str
    wave: int
    script: str
    arguments: tuple[str, ...] = ()


def linears(name: str, wave: int, methods: str, tokens: str, peers: Sequence[str], *more: str) -> Part:
    """A part of `linears.py` on the seven linear layers of a decoder layer."""
    shapes = () if "--shapes" in more else ("--shapes", "layer")
    asked = ("--methods", *methods.split(), "--tokens", *tokens.split(), "--ranks", "16", *shapes, *more)
    return Part(name, wave, "linears.py", (*asked, "--case-seconds", "8", *(("--peers", *peers) if peers else ())))


LORA = ("--methods", "lora")
PEFT, COMPILED, BNB = "peft", "peft, compiled", "peft + bitsandbytes"
PATH, BASE = "unsloth's path", "base"
FEW = ("rewrite, graphs", PEFT, COMPILED, "peft, graphs", PATH, BNB, f"{BNB}, compiled", "torchao, compiled", BASE)
PARTS = (
    linears("lora", 0, "lora", "8192", [PEFT, COMPILED, "peft, fp32 adapters", PATH, BASE]),
    linears("dropout", 0, "dropout", "8192", [PEFT, COMPILED, BASE]),
    linears("qlora", 0, "qlora", "2048 128", [BNB, f"{BNB}, compiled", PATH, "bitsandbytes, frozen", BASE]),
    linears("dora", 0, "dora", "8192", [PEFT, COMPILED, BASE]),
    Part("steps", 0, "steps.py", (*LORA, "--models", "layer", "--tokens", "8192", "--peers", PEFT, COMPILED, PATH)),
    Part("operators", 1, "operators.py"),
    Part("layers", 1, "steps.py", (*LORA, "--models", "layer", "layers", "--tokens", "8192")),
    linears("few tokens", 2, "lora qlora", "1 32 512", FEW),
    linears("others", 2, "s2ft multi qdora", "2048", ()),
    linears("shapes", 2, "lora", "8192 512", [COMPILED, PATH, BASE], "--shapes", "q,o", "k,v", "gate,up", "down"),
    linears("unsloth", 2, "lora qlora", "2048", ["unsloth", PATH], "--shapes", "q,o"),
    Part("1b", 2, "steps.py", ("--models", "1b", "--methods", "lora", "qlora", "--tokens", "2048")),
)
SHARES = (0.6, 0.75, 1.0)
"""By when a wave has ended, of the budget."""


@dataclass
class Running:
    """A part at work, with the files that it writes."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    found: Path
    begin: float = field(default_factory=time.monotonic)
    state: str = "running"

    def poll(self) -> bool:
        """Whether it goes on."""
        code = self.process.poll()
        if code is None:
            return True
        if self.state == "running":
            self.state = "done" if code == 0 else f"ended with {code}"
        return False

    def stop(self) -> None:
        """End it with all that it started."""
        self.state = f"stopped after {time.monotonic() - self.begin:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def described(self) -> dict[str, Any]:
        text = self.log.read_text(errors="replace")
        found: dict[str, Any] = {"state": self.state, "arguments": list(self.part.arguments)}
        if self.found.exists():
            found |= json.loads(self.found.read_text())
        if self.state not in ("running", "done"):
            found["end of log"] = text[-2000:]
        return found


class Session:
    """The parts of one run, and their results in a folder."""

    def __init__(self, args: argparse.Namespace, work: Path, begin: float) -> None:
        self.args, self.work, self.all = args, work, list[Running]()
        self.deadline = Deadline(args.budget - min(LAST, args.budget / 4) - (time.monotonic() - begin))

    def start(self, part: Part) -> Running:
        stem = part.name.replace(" ", "_")
        log = self.work / f"{stem}.log"
        command = [sys.executable, str(HERE / part.script), *part.arguments]
        command += ["--out", str(self.work), "--name", stem, *(SMALL if self.args.dry else ())]
        if self.args.profile and part.script != "operators.py":
            command += ["--profile", str(self.args.out / "profile.txt")]
        environment = {**os.environ, "REWRITE_BENCH_LOCK": str(self.work / "lock")}
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each part
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        found = Running(part, process, log, self.work / f"{stem}.json")
        self.all.append(found)
        return found

    def wave(self, parts: Sequence[Part], until: Deadline) -> None:
        """Run some parts at once; stop those that have not ended in time."""
        running = [self.start(part) for part in parts]
        while running := [r for r in running if r.poll()]:
            if until.passed or self.deadline.passed:
                for r in running:
                    r.stop()
                break
            self.save()
            time.sleep(0.5)
        self.save()

    def save(self) -> dict[str, Any]:
        """What there is, into the folder."""
        data = {"parts": {r.part.name: r.described() for r in self.all}}
        write(self.args.out / "gpu.json", data)
        return data


def main() -> None:
    args = arguments()
    begin = time.monotonic() - max(0.0, time.time() - float(os.environ.get("REWRITE_BENCH_BEGAN", "inf")))
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [p for p in PARTS if not args.parts or p.name in args.parts]
    with tempfile.TemporaryDirectory() as work:
        session = Session(args, Path(work), begin)
        for number, share in enumerate(SHARES):
            left = args.budget * share - (time.monotonic() - begin)
            parts = [p for p in wanted if p.wave == number]
            if parts and left > 0:
                session.wave(parts, Deadline(left))
        data = session.save()
        logs = "".join(f"=== {r.part.name}: {r.state}\n{r.log.read_text(errors='replace')}\n" for r in session.all)
    (args.out / "gpu.log").write_text(logs)
    text = judged(data)
    (args.out / "targets.txt").write_text(text)
    print(
        f"{text}\n{time.monotonic() - begin:.0f} s of {args.budget:.0f} s, all of it in {args.out}/gpu.json", flush=True
    )
    picture(args.out / "gpu.png", "a step", bars([r for p in data["parts"].values() for r in p.get("results", ())]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("benchmarks/results"))
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything")
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in PARTS], help="these alone")
    parser.add_argument("--profile", action="store_true", help="write profile.txt, kernel tables, and time nothing")
    parser.add_argument("--dry", action="store_true", help="on the CPU and as small as it goes: does everything start?")
    return parser.parse_args()


if __name__ == "__main__":
    main()
