"""The GPUs that kernels are generated for, and what of them limits a launch."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A CUDA architecture: compute capability, and the bytes of shared memory that one program may use.

    >>> Target(90, 232_448).name
    'sm_90'
    """

    capability: int
    shared: int

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"


SM80 = Target(80, 166_912)
SM90 = Target(90, 232_448)
TARGETS = {target.name: target for target in (SM80, SM90)}


@functools.cache
def of_device(device: torch.device) -> Target:
    """The target that a CUDA device is, by its own count of shared memory; an H100 where kernels are interpreted.

    So tests without a GPU run the configurations that one would.
    """
    if device.type != "cuda":
        return SM90
    found = torch.cuda.get_device_properties(device.index or 0)
    return Target(found.major * 10 + found.minor, found.shared_memory_per_block_optin)


def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at once, at one on each multiprocessor; 4 under the interpreter."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else 4


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def unusable(device: torch.device) -> str | None:
    """Why generated kernels do not run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip:
        return "kernels are generated for NVIDIA's GPUs"
    if device.type == "cuda" and (found := of_device(device)).capability < SM80.capability:
        return f"kernels are generated for {SM80.name} and later, this is {found.name}"
    return None
