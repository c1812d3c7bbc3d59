"""C++ sources -> shared libraries: compiled at first use, kept in the user's cache, loaded once a process.

A source with a plain C interface and no header of PyTorch compiles in a second or two; one that defines operators of
PyTorch, for calls whose way through Python would take as long as they do, in about ten.  Threads are those of OpenMP,
which PyTorch's own are.  Whatever goes wrong has a reason (`Build.failure`), and the caller falls back to PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock

from rewrite.codegen import cache

SWITCH = "REWRITE_CPU_KERNELS"  # set to 0, it keeps every C++ kernel away
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-psabi")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
_SETS = {  # what the compiler may use; the sources look at its macros
    "AMX": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "AVX512_BF16": (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
PORTABLE = "portable"
_PATIENCE = 1.5  # seconds of silence
_LONGEST = 300  # seconds for a compiler, or for another process that compiles the same


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What this processor has of the instructions to compile for, best first; `ATEN_CPU_CAPABILITY` lowers it.

    >>> instruction_sets()[-1]
    'portable'
    """
    found, level = [PORTABLE], torch.backends.cpu.get_cpu_capability()
    if level in ("AVX2", "AVX512"):
        found.append("AVX2")
    if level == "AVX512":
        found.append("AVX512")
        if _has("_is_avx512_bf16_supported"):
            found.append("AVX512_BF16")
            if _has("_is_amx_tile_supported") and _has("_init_amx"):  # the system lends tiles to who asks
                found.append("AMX")
    return tuple(found[::-1])


def _has(name: str) -> bool:
    # Not documented; a PyTorch without it gets the next set.
    return bool(getattr(torch.cpu, name, bool)())


@dataclass
class Build:
    """One source for one instruction set.

    `library()` compiles and loads it the first time; `failure` is then why there is none, or None.
    """

    source: Path
    target: str
    operators: bool = False  # whether the source defines operators of PyTorch, and needs its headers
    failure: str | None = None
    threads: bool = True  # whether the compiler has OpenMP
    _loaded: ctypes.CDLL | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def library(self) -> ctypes.CDLL | None:
        """The loaded library; None where it cannot be had, for the reason `refusal()`."""
        if switched_off():
            return None
        if self._loaded is None and self.failure is None:
            with self._lock:
                if self._loaded is None and self.failure is None:
                    self._load()
        return self._loaded

    def refusal(self) -> str | None:
        """Why the library is not used, as far as is known without compiling; None if nothing speaks against it."""
        return f"{SWITCH}=0" if switched_off() else self.failure

    def route(self) -> str:
        """What computes, and why it is not the kernels where it is not: a line."""
        if reason := self.refusal():
            return f"PyTorch operators, no C++ kernels: {reason}"
        how = f"C++ kernels, {'no vector instructions' if self.target == PORTABLE else self.target}"
        if not self.loaded:
            return f"{how}, compiled at the first use"
        return how if self.threads else f"{how}, one thread: the compiler has no OpenMP"

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    def _load(self) -> None:
        try:
            path, self.threads = _compiled(self.source, self.target, _pytorch(self.target) if self.operators else ())
            self._loaded = ctypes.CDLL(str(path))
        except (OSError, _Failed) as error:  # no compiler, or one that refuses
            self.failure = " ".join(str(error).split())


def switched_off() -> bool:
    """Whether the user keeps the C++ kernels away (`REWRITE_CPU_KERNELS=0`)."""
    return os.environ.get(SWITCH) == "0"


@functools.cache
def build(source: Path, target: str, operators: bool = False) -> Build:
    """The one `Build` of a source for one of the `instruction_sets` in this process."""
    assert target in instruction_sets()  # which also asks the system for what it lends
    return Build(source, target, operators)


def namespace(target: str) -> str:
    """The namespace of the operators that a source defines for an instruction set, `torch.ops.<namespace>`."""
    return f"rewrite_{target.lower()}"


def _pytorch(target: str) -> tuple[str, ...]:
    """Flags for a source that defines operators: its namespace, and the headers and libraries of this PyTorch."""
    root = Path(torch.__file__).parent
    include = root / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return (
        *("-std=c++20", "-w", f"-DREWRITE_NAMESPACE={namespace(target)}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"),
        *(f"-L{root / 'lib'}", *(("-Wl,--no-as-needed",) if sys.platform == "linux" else ()), "-ltorch_cpu", "-lc10"),
    )


class _Failed(Exception):
    pass


def _compiled(source: Path, target: str, more: tuple[str, ...]) -> tuple[Path, bool]:
    """(library, whether it has threads), compiled by this process or before."""
    compiler = _compiler()
    reasons = []
    for threads in (("-fopenmp",), ()):  # Apple's compiler has no OpenMP
        command = (compiler, *_FLAGS, *_SETS.get(target, ()), *threads, *more)
        path = cache.folder("cpu") / f"{source.stem}-{target.lower()}-{_digest(source, command)}.so"
        try:
            _compile(command, source, path)
            return path, bool(threads)
        except _Failed as error:
            reasons.append(str(error))
    raise _Failed(reasons[-1])


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise _Failed(f"CXX={chosen} is not a program" if chosen else "no C++ compiler; install one, or set CXX to it")


def _digest(source: Path, command: tuple[str, ...]) -> str:
    # The file of the compiler and its date stand for its version, which would take a process to ask for.
    stamp = os.stat(command[0]).st_mtime_ns
    found = hashlib.sha256("\0".join((*command, str(stamp), platform.machine(), torch.__version__)).encode())
    for file in (source, *sorted(source.parent.glob("*.h"))):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _compile(command: tuple[str, ...], source: Path, path: Path) -> None:
    if path.exists():
        return
    with FileLock(f"{path}.lock", timeout=_LONGEST):  # its Timeout is an OSError
        if path.exists():  # another process was first
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, _patience(source):
            made = Path(folder) / path.name
            _run([*command, str(source), "-o", str(made)])
            os.replace(made, path)  # in one step: whoever looks finds all of it or nothing


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST, check=False)
    except subprocess.TimeoutExpired as error:
        raise _Failed(f"{command[0]} took more than {_LONGEST} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        told = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise _Failed(f"{command[0]} failed ({done.returncode}): {told}")


@contextlib.contextmanager
def _patience(source: Path) -> Iterator[None]:
    """Says what is being waited for, once it takes long."""
    begin = time.perf_counter()

    def tell() -> None:
        print(f"rewrite: compiling {source.name} for this CPU, once ...", file=sys.stderr, flush=True)

    timer = threading.Timer(_PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if time.perf_counter() - begin > _PATIENCE:
            timer.join()
