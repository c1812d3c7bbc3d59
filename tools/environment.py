"""Make the virtual environment that `make test` and `make demo` run in.

    python3 tools/environment.py .venv test [--torch REQUIREMENT]

A torch that the calling interpreter can already import is used when its version is in the range that
pyproject.toml asks for; otherwise one tested version is installed, its CPU build where pip's indexes have one: the
unpinned default on Linux is the newest build, with several gigabytes of CUDA.  This script needs the standard
library only, and installs nothing outside the environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
TRITONS = ("3.6.0", "3.7.1")
"""What the tests compile kernels with, those of torch 2.11 and 2.13; what is not installed stands beside."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the virtual environment of the tests and the demo.")
    parser.add_argument("venv", type=Path, help="folder of the environment; made where it does not exist")
    parser.add_argument("extra", help="extra of pyproject.toml to install: hf, test or bench")
    parser.add_argument("--torch", default="", help="torch to install where none is in range")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - only an older interpreter can need this message
        return fail(f"rewrite needs Python 3.11 or newer; {sys.executable} is {platform.python_version()}")

    python = args.venv / "bin" / "python"
    if not (python.exists() and quiet(python, "-m", "pip", "--version")):
        if importlib.util.find_spec("ensurepip") is None:
            return fail(
                "this Python cannot make virtual environments: its module ensurepip is missing\n"
                "  Debian and Ubuntu: apt install python3-venv; or use another: make PYTHON=python3.12 ..."
            )
        create(args.venv, python)
    if not usable_torch(python):
        wanted = [args.torch] if args.torch else [f"torch=={TORCH}+cpu", f"torch=={TORCH}"]
        say(f"installing {wanted[-1]}")
        if not any(pip(python, requirement, silent=requirement != wanted[-1]) for requirement in wanted):
            return fail(f"{wanted[-1]} could not be installed; to choose another build: make test TORCH='torch==...'")
    say(f"installing rewrite and what .[{args.extra}] needs")
    if not pip(python, "--editable", f"{ROOT}[{args.extra}]"):
        return fail("the installation failed; pip's message is above")
    if args.extra == "test" and not beside(args.venv, python):
        return fail("Triton could not be installed; pip's message is above")
    say("ready")
    return 0


def beside(venv: Path, python: Path) -> bool:
    """Put each version of Triton that kernels are checked with into a folder of its own, but for the installed one."""
    installed = output(python, "import importlib.metadata as m; print(m.version('triton'))")
    if not installed:  # there are wheels for Linux alone
        return True
    for version in TRITONS:
        folder = venv / f"triton-{version}"
        if version != installed and not folder.exists():
            say(f"installing triton {version} beside {installed}, to check kernels with both")
            if not pip(python, "--no-deps", "--target", str(folder), f"triton=={version}"):
                return False
    return True


def create(venv: Path, python: Path) -> None:
    """An empty environment, or one that shares the caller's packages when a usable torch is among them."""
    version = usable_torch(Path(sys.executable))
    say(f"making {venv}" + (f", with the torch {version} of {sys.executable}" if version else ""))
    share = ["--system-site-packages"] if version else []
    subprocess.run([sys.executable, "-m", "venv", *share, str(venv)], check=True)
    if version and not usable_torch(python):
        # The caller is itself a virtual environment, and those are not shared by the option.
        theirs = output(Path(sys.executable), "import torch; print(torch.__path__[0])")
        site = output(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
        (Path(site) / "shared.pth").write_text(f"{Path(theirs).parent}\n")


def usable_torch(python: Path) -> str:
    """The version of the torch that `python` imports, or "" when there is none in range."""
    version = output(python, "import torch; print(torch.__version__)")
    return version if in_range(version) else ""


def in_range(version: str) -> bool:
    """Whether `version` meets the requirement on torch in pyproject.toml.

    >>> [in_range(v) for v in ("2.11.0+cu130", "2.13.1", "2.11.0a0", "2.14.0", "")]
    [True, True, False, False, False]
    """
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(d for d in project["dependencies"] if d.startswith("torch>="))
    bounds = re.fullmatch(r"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)", wanted)
    found = re.match(r"(\d+)\.(\d+)\.(\d+)(?=(a|b|rc|\.dev)?)", version)
    if bounds is None or found is None:
        return False
    low_major, low_minor, high_major, high_minor = map(int, bounds.groups())
    major, minor, patch = map(int, found.groups()[:3])
    released = found.group(4) is None
    return (low_major, low_minor, 0, True) <= (major, minor, patch, released) < (high_major, high_minor)


def pip(python: Path, *arguments: str, silent: bool = False) -> bool:
    command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=silent).returncode == 0


def quiet(python: Path, *arguments: str) -> bool:
    return subprocess.run([str(python), *arguments], capture_output=True).returncode == 0


def output(python: Path, code: str) -> str:
    """What `code` prints, or "" when it fails; run from /, so that no folder here can shadow a module."""
    done = subprocess.run([str(python.absolute()), "-c", code], capture_output=True, text=True, cwd="/")
    return done.stdout.strip() if done.returncode == 0 else ""


def say(message: str) -> None:
    print(f"environment: {message}", flush=True)


def fail(message: str) -> int:
    print(f"environment: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
