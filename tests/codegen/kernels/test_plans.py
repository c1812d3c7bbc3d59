"""Plans: made once for each layout of the tensors, anew where shapes, strides, dtypes or scales change."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rewrite.codegen import nf4
from rewrite.codegen.kernels import dropout, gradients, kernel, linear, nf4_linear, plans, tune
from rewrite.codegen.kernels.kernel import Config, Kernel
from rewrite.codegen.kernels.products import SumOfProducts, Term
from rewrite.codegen.storage import Nf4

Tensor = torch.Tensor


@pytest.fixture
def built(monkeypatch) -> list[type]:
    """The kernels that are constructed, in order."""
    found: list[type] = []

    def counted(init):
        def build(self, *arguments, **options):
            found.append(type(self))
            init(self, *arguments, **options)

        return build

    for cls in _subclasses(Kernel):
        monkeypatch.setattr(cls, "__init__", counted(cls.__init__))
    return found


def _subclasses(cls: type) -> list[type]:
    return [each for direct in cls.__subclasses__() for each in (direct, *_subclasses(direct))]


def values(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def nf4_product(device: torch.device) -> None:
    packed = nf4.Nf4Tensors.from_weight(torch.randn(72, 288, device=device), 32)
    stored, layout = [packed.codes, packed.absmax], str(Nf4((72, 288), torch.bfloat16, 32))
    branch = [values(1, 3, device=device)], [values(72, 3, device=device)], [2.0], [0], []
    arguments = (values(1, 288, device=device), stored, layout, None, *branch)
    assert not isinstance(nf4_linear.product(*arguments), str)
    dy = values(1, 72, device=device)
    assert not isinstance(nf4_linear.input_gradient(dy, stored, layout), str)


def dense_product(device: torch.device) -> None:
    x, h, W, B = (values(*shape, device=device) for shape in ((5, 136), (5, 3), (72, 136), (72, 3)))
    linear.product(x, [W], "dense", None, [h], [B], [2.0], [0], [])
    total = linear.Sum([x, h], [W.t(), B.t()], [1.0, 2.0], [0, 0])
    assert total.supports() is None
    total.fused(x.new_empty(5, 72))


def low_rank_gradients(device: torch.device) -> None:
    dy, h, B = (values(*shape, device=device) for shape in ((70, 136), (70, 3), (136, 3)))
    gradients.supports(dy, h, B)
    gradients.low_rank_gradients(dy, h, B, 2.0)


def dropped_linear(device: torch.device) -> None:
    x, A, dh = (values(*shape, device=device) for shape in ((5, 136), (3, 136), (5, 3)))
    seed = torch.ones(1, dtype=torch.int64, device=device)
    assert dropout.supports(x, A, [3], [0.1]) is None
    dropout.linear(x, A, seed, [3], [0.1])
    dropout.gradient(dh, x, seed, [3], [0.1])
    dropout.input_gradient(dh, A, seed, [3], [0.1], x, add=True)
    dropout.dropout(x, seed, 0.1)


@pytest.mark.parametrize("call", [nf4_product, dense_product, low_rank_gradients, dropped_linear])
def test_a_second_call_builds_no_kernel(call: Callable[[torch.device], None], built, device):
    call(device)
    assert built
    built.clear()
    call(device)
    assert not built


def test_whatever_the_plan_may_depend_on_plans_anew():
    planned: list[tuple] = []

    @plans.by_layout
    def plan(*arguments):
        planned.append(arguments)
        return len(planned)

    x = torch.zeros(4, 6)
    calls = [
        (x, [x], [2.0], False),
        (x[:3], [x], [2.0], False),
        (x.t().contiguous().t(), [x], [2.0], False),
        (x.double(), [x], [2.0], False),
        (x.to("meta"), [x], [2.0], False),
        (x, [x[:, :3]], [2.0], False),
        (x, [x, x], [2.0], False),
        (x, [], [2.0], False),
        (x, [x], [3.0], False),
        (x, [x], [2.0], True),
        (x, None, [2.0], False),
    ]
    assert [plan(*each) for each in calls] == list(range(1, len(calls) + 1))
    assert [plan(*each) for each in calls] == list(range(1, len(calls) + 1))
    assert plan(torch.ones(4, 6), [x.clone()], (2.0,), False) == 1


def test_layouts_beyond_what_is_kept_are_planned_again(monkeypatch):
    monkeypatch.setattr(plans, "KEPT", 2)
    planned = []
    plan = plans.by_layout(planned.append)
    for size in (1, 2, 3, 3, 1):
        plan(size)
    assert planned == [1, 2, 3, 1]


def test_autotuning_that_is_asked_for_later_is_heard(device, monkeypatch):
    x, h, W, B = (values(*shape, device=device) for shape in ((5, 136), (5, 3), (72, 136), (72, 3)))
    arguments = (x, [W], "dense", None, [h], [B], [2.0], [0], [])
    for asked in (False, True, False):
        monkeypatch.setattr(tune, "_asked", asked)
        assert isinstance(linear.product(*arguments), Tensor if asked else str)


def test_a_hash_is_of_all_fields_and_computed_once(monkeypatch):
    def kernel(scale: float) -> SumOfProducts:
        return SumOfProducts(72, (Term(136, 136, 1, 136), Term(3, 3, 1, 3, scale)), False, torch.bfloat16)

    assert kernel(2.0) == kernel(2.0)
    assert hash(kernel(2.0)) == hash(kernel(2.0)) != hash(kernel(3.0))
    hashed, of_term = [], Term.__hash__
    monkeypatch.setattr(Term, "__hash__", lambda self: hashed.append(self) or of_term(self))
    one = kernel(2.0)
    assert hash(one) == hash(one)
    assert len(hashed) == 2


class Compiled:
    """Stands in for what Triton has compiled for the arguments of a launch."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple] = []

    def launch_metadata(self, grid, stream, *arguments):
        return "said"

    def run(self, *arguments):
        self.runs.append(arguments)


def test_what_is_compiled_for_aligned_arguments_is_launched_without_a_look_up(monkeypatch):
    looked_up, compiled = [], Compiled()

    class Function:
        def __getitem__(self, grid):
            return lambda *arguments, **options: looked_up.append((grid, arguments, options)) or compiled

    monkeypatch.setattr(SumOfProducts, "function", Function())
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    monkeypatch.setattr(kernel, "_runtime", lambda: hooks)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream of {index}", raising=False)
    one = SumOfProducts(72, (Term(136, 136, 1, 136),), False, torch.bfloat16)
    config = Config.of(warps=8, stages=3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=128)
    launch = kernel._Launch(one, config, torch.device("cuda", 1), (4,))
    options = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    memory = torch.zeros(64, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0
    first, second, apart = ((*memory.split(16)[:3], 136, 5), (*memory.split(8)[:3], 136, 5), (*memory[1:4], 136, 5))
    for arguments in (apart, first, second, apart, first):
        launch(arguments)
    assert looked_up == [((4,), arguments, options) for arguments in (apart, first, apart)]
    start = 4, 1, 1, "stream of 1", "function", "metadata"
    assert compiled.runs == [(*start, None, None, None, *each, 32, 64, 128) for each in (second, first)]
    hooks.launch_enter_hook.calls.append("a profiler's")
    launch(first)
    assert compiled.runs[-1] == (*start, "said", hooks.launch_enter_hook, None, *first, 32, 64, 128)
