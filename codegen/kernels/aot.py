"""Kernels compiled for a GPU that is not there: registers, spills, shared memory and instructions of the machine code.

ptxas, cuobjdump and nvdisasm come with Triton; neither a GPU nor a CUDA toolkit is needed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from rewrite.codegen.kernels.kernel import Config, Kernel
from rewrite.codegen.kernels.target import Target

_TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async)\b"


@dataclass(frozen=True)
class Resources:
    """What the machine code of one configuration takes; `error` where it could not be compiled."""

    registers: int = 0
    spills: int = 0
    """Bytes of stack, which is where registers go that do not fit."""
    shared: int = 0
    products: int = 0
    """Instructions of the tensor cores."""
    fused: int = 0
    """Fused multiply-adds of float32, counted in kernels that must have none."""
    error: str = ""


def compile(kernel: Kernel, config: Config, target: Target) -> Resources:
    """Compile one configuration of a kernel for a target.

    Needs Triton without its interpreter (`TRITON_INTERPRET` unset).
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    function = kernel.function
    arguments, constants = dict(kernel.arguments()), dict(config.tiles)
    names = [name for name in function.arg_names]
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": kernel.fp_fusion}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    with _diagnostics() as said:
        try:
            built = build(source, target=GPUTarget("cuda", target.capability, 32), options=options)
        except Exception as error:  # the compiler fails in many ways: LLVM, ptxas, its own passes
            lines = [line for line in said() if "error:" in line] or str(error).strip().splitlines()[-1:]
            return Resources(error=" ".join([f"{type(error).__name__}:", *lines[:1]]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        # Two thirds of the time of a small kernel.
        code = "" if kernel.fp_fusion else _output(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    return Resources(
        registers=int(_found(r"REG:(\d+)", usage)),
        spills=int(_found(r"STACK:(\d+)", usage)),
        shared=int(built.metadata.shared),
        products=len(re.findall(_TENSOR_CORES, built.asm["ptx"])),
        fused=len(re.findall(r"\bFFMA\d?\b", code)),
    )


@contextlib.contextmanager
def _diagnostics() -> Iterator[Callable[[], list[str]]]:
    """Catches what the compiler writes to the process's stderr, whole programs among it; the lines so far."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> list[str]:
            file.seek(0)
            return file.read().splitlines()

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def compile_all(jobs: Sequence[tuple[Kernel, Config, Target]], workers: int = 2) -> Iterator[Resources]:
    """Compile many configurations in processes of their own, where Triton does not interpret; results in order."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        with _compiling():
            results = pool.map(compile, *zip(*jobs, strict=True)) if jobs else iter(())
        yield from results


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Processes that are started in the block import a Triton that compiles."""
    set_here = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if set_here is not None:
            os.environ["TRITON_INTERPRET"] = set_here


def complaints(kernel: Kernel, config: Config, target: Target, found: Resources) -> list[str]:
    """What is wrong with a compiled configuration: errors, spills, shared memory, tensor cores, lost rounding."""
    if found.error:
        return [f"does not compile: {found.error}"]
    wrong = []
    if found.spills:
        wrong.append(f"spills {found.spills} bytes of registers")
    if found.shared > target.shared:
        wrong.append(f"needs {found.shared:,} bytes of shared memory, {target.name} has {target.shared:,}")
    rows = dict(config.tiles).get("BLOCK_M", 0)
    if kernel.products and rows >= 64 and not found.products:
        wrong.append(f"no tensor-core instruction at BLOCK_M={rows}")
    if not kernel.fp_fusion and found.fused:
        wrong.append(f"contracts {found.fused} products and sums that must be rounded one by one")
    return wrong


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else "0"
