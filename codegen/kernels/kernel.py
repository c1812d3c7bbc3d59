"""What every kernel states: its structure, where it applies, its arguments, its configurations and its launch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rewrite.codegen.kernels import template, tune
from rewrite.codegen.kernels.target import Target, of_device

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Config:
    """One point of an autotune space: the sizes of tiles by name, warps of a program, stages of its pipeline.

    >>> str(Config.of(warps=8, stages=3, BLOCK_M=128, BLOCK_N=64))
    'BLOCK_M=128 BLOCK_N=64, 8 warps, 3 stages'
    """

    tiles: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(cls, warps: int = 4, stages: int = 3, **tiles: int) -> Config:
        return cls(tuple(tiles.items()), warps, stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.tiles)[name]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.tiles)
        return f"{sizes}, {self.warps} warps, {self.stages} stages"


def triton_type(dtype: torch.dtype) -> str:
    """The name that Triton has for a dtype.

    >>> triton_type(torch.bfloat16)
    'bf16'
    """
    return _TYPES[dtype]


class Kernel:
    """A frozen dataclass whose fields are the structure, the fixed shapes and the dtypes of one generated source.

    The first line of a kernel's docstring is its equation.  Fields are names of the template; sizes that are fields are
    constants of the source, the others (tokens) are arguments.
    """

    name: ClassVar[str]
    """What the kernel is called; its template is `templates/<name>.py.j2`, unless `template` says otherwise."""
    template: ClassVar[str] = ""
    applies: ClassVar[str]
    """Where an operator takes this kernel, in a few words."""
    cpu: ClassVar[str]
    """What computes the same on a CPU."""
    products: ClassVar[bool] = False
    """Whether tiles of 64 rows and more must use tensor cores."""
    fp_fusion: ClassVar[bool] = True
    """Whether products and sums may be contracted to one rounding; off where results must be bit-exact."""

    def supports(self) -> str | None:
        """Why there is no kernel for this structure, or None."""
        raise NotImplementedError

    def arguments(self) -> Mapping[str, str]:
        """The arguments of the kernel in order, each with its Triton type (`*bf16`, `i32`, `fp32`)."""
        raise NotImplementedError

    def space(self, target: Target) -> Sequence[Config]:
        """The autotune space for a target; the first is taken where nothing was measured."""
        raise NotImplementedError

    def shared(self, config: Config) -> int:
        """Bytes of shared memory that a configuration needs at least."""
        return 0

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        """Programs of a launch, by the sizes that are not fields."""
        raise NotImplementedError

    def choose(self, configs: Sequence[Config], **sizes: int) -> Config:
        """The configuration that is taken for these sizes where nothing was measured."""
        return configs[0]

    def names(self) -> dict[str, Any]:
        """What the template reads."""
        assert dataclasses.is_dataclass(self)
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        equation = (self.__doc__ or "").partition("\n")[0]
        return {**found, "equation": equation, "structure": self, "type": triton_type}

    def configs(self, target: Target) -> tuple[Config, ...]:
        """The space less what the target has not the shared memory for."""
        return tuple(c for c in self.space(target) if self.shared(c) <= target.shared)

    @property
    def source(self) -> str:
        """The generated Triton source."""
        return _source(self)

    @property
    def function(self) -> Any:
        """The compiled-on-demand Triton function of the generated source."""
        return _function(self)

    def launch(self, *tensors: Any, config: Config | None = None, **sizes: int) -> None:
        """Run the kernel over its arguments, sizes last, on their device; `config` is chosen where it is not given."""
        grid_of = functools.partial(self.grid, **sizes)
        run = functools.partial(_launch, self, grid_of, (*tensors, *sizes.values()))
        device = next((t.device for t in tensors if isinstance(t, torch.Tensor)), None)
        with torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext():
            if config is None:
                config = _chosen(self, device, run, sizes)
            if 0 not in grid_of(config):
                run(config)


def _chosen(
    kernel: Kernel, device: torch.device | None, run: Callable[[Config], None], sizes: dict[str, int]
) -> Config:
    if device is None or device.type != "cuda":  # interpreted: every configuration computes the same
        return kernel.space(_INTERPRETED)[0]
    configs = _legal(kernel, device.index or 0)
    default = kernel.choose(configs, **sizes)
    if not tune.wanted():
        return default
    key = kernel, device, tuple(size.bit_length() for size in sizes.values())  # shared up to a factor of two
    return tune.fastest(key, configs, run, default)


_INTERPRETED = Target(90, 232_448)


@functools.cache
def _legal(kernel: Kernel, index: int) -> tuple[Config, ...]:
    return kernel.configs(of_device(index))


def _launch(
    kernel: Kernel, grid: Callable[[Config], tuple[int, ...]], arguments: tuple[Any, ...], config: Config
) -> Any:
    compiled = kernel.function[grid(config)](
        *arguments,
        **dict(config.tiles),
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=kernel.fp_fusion,
    )
    if os.environ.get("REWRITE_DUMP"):
        from rewrite.codegen.kernels import dump

        dump.kernel(kernel, config, compiled)
    return compiled


@functools.cache
def _source(kernel: Kernel) -> str:
    return template.render(kernel.template or kernel.name, kernel.names())


@functools.cache
def _function(kernel: Kernel) -> Any:
    return template.load(kernel.name, kernel.source).kernel
