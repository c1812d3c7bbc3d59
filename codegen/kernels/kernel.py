"""What every kernel states: its structure, where it applies, its arguments, its configurations and its launch."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rewrite.codegen.kernels import plans, template, tune
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


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` needs besides its operands, for products of float32 that are not rounded to TF32."""
    return ', input_precision="ieee"' if dtype == torch.float32 else ""


def tiles_of(size: int, tile: int) -> int:
    """How many tiles cover a size.

    >>> tiles_of(129, 64)
    3
    """
    return -(-size // tile)


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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__hash__ = Kernel.__hash__  # or `dataclass` would write one that hashes every field at every look-up

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        assert dataclasses.is_dataclass(self)
        return hash((type(self), *(getattr(self, field.name) for field in dataclasses.fields(self))))

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
        """Run the kernel over its arguments, sizes last, on their device; `config` is chosen where it is not given.

        Numbers among the arguments are sizes.
        """
        first: torch.Tensor = tensors[0]
        device, on_gpu = first.device, first.is_cuda
        if on_gpu and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(*tensors, config=config, **sizes)
        named, arguments = tuple(sizes.items()), (*tensors, *sizes.values())
        if config is None and on_gpu and tune.wanted():
            config = _fastest(self, device, named, arguments)
        if launch := _launch(self, device, named, config):
            launch(arguments)


class _Launch:
    """A kernel with everything about its launch but the arguments.

    Triton looks up by the arguments what it has compiled for them: by their types, which the kernel states, by the
    sizes, which are those of the launch, and by whether addresses are multiples of 16.  Where all of them are, as but
    for some views they are, only the first call goes that way; its look-up takes longer than all the rest of a call.
    """

    def __init__(self, kernel: Kernel, config: Config, device: torch.device, grid: tuple[int, ...]) -> None:
        self.kernel, self.config, self.device = kernel, config, device.index
        self.grid = (*grid, 1, 1)[:3]
        self.start = kernel.function[grid]
        options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": kernel.fp_fusion}
        self.options = {**dict(config.tiles), **options}
        self.constants = tuple(size for _, size in config.tiles)
        self.pointers = sum(of.startswith("*") for of in kernel.arguments().values())
        self.compiled: Any = None

    def __call__(self, arguments: Sequence[Any]) -> None:
        addresses = 0
        for tensor in arguments[: self.pointers]:
            addresses |= tensor.data_ptr()
        if addresses % 16:
            self._looked_up(arguments)
        elif self.compiled is None:
            self.compiled = self._looked_up(arguments)
        else:
            self._at_once(self.compiled, (*arguments, *self.constants))

    def _looked_up(self, arguments: Sequence[Any]) -> Any:
        compiled = self.start(*arguments, **self.options)
        if os.environ.get("REWRITE_DUMP"):
            from rewrite.codegen.kernels import dump

            dump.kernel(self.kernel, self.config, compiled)
        return compiled

    def _at_once(self, compiled: Any, arguments: Sequence[Any]) -> None:
        """As `triton.runtime.jit.JITFunction.run` does when it has found what is compiled; hooks are for profilers."""
        runtime, stream = _runtime(), torch._C._cuda_getCurrentRawStream(self.device)
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        before, after = (hook if getattr(hook, "calls", True) else None for hook in (before, after))
        said = compiled.launch_metadata(self.grid, stream, *arguments) if before or after else None
        given = compiled.function, compiled.packed_metadata, said, before, after
        compiled.run(*self.grid, stream, *given, *arguments)


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


@plans.kept
def _launch(
    kernel: Kernel, device: torch.device, sizes: tuple[tuple[str, int], ...], config: Config | None
) -> _Launch | None:
    """The launch for these sizes, None where there is nothing to compute."""
    if config is None:
        config = kernel.choose(_legal(kernel, device), **dict(sizes))
    grid = kernel.grid(config, **dict(sizes))
    return None if 0 in grid else _Launch(kernel, config, device, grid)


def _fastest(
    kernel: Kernel, device: torch.device, sizes: tuple[tuple[str, int], ...], arguments: Sequence[Any]
) -> Config:
    def run(config: Config) -> None:
        if launch := _launch(kernel, device, sizes, config):
            launch(arguments)

    configs = _legal(kernel, device)
    key = kernel, device, tuple(size.bit_length() for _, size in sizes)  # shared up to a factor of two
    return tune.fastest(key, configs, run, kernel.choose(configs, **dict(sizes)))


@functools.cache
def _legal(kernel: Kernel, device: torch.device) -> tuple[Config, ...]:
    return kernel.configs(of_device(device))


@functools.cache
def _source(kernel: Kernel) -> str:
    return template.render(kernel.template or kernel.name, kernel.names())


@functools.cache
def _function(kernel: Kernel) -> Any:
    return template.load(kernel.name, kernel.source).kernel
