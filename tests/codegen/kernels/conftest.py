"""What tests of kernels share: the device that they run on, and references in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rewrite.codegen.kernels import interpret, plans
from tests.codegen.kernels import watched


@pytest.fixture(scope="session", autouse=True)
def repaired() -> None:
    """Triton's interpreter with its bfloat16 made right, and every access checked, where kernels are interpreted."""
    pytest.importorskip("triton")
    if interpret.active():
        interpret.repair()
        watched.install()


@pytest.fixture(autouse=True)
def unwritten_memory_is_not_a_number(repaired: None) -> Iterator[None]:
    """What a kernel leaves out of `torch.empty` shows: on a GPU that memory holds what was there before."""
    if not interpret.active():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def planned_anew() -> None:
    """No plan of another test, which may have changed what plans take for fixed."""
    plans.forget()


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where kernels run: a GPU, or CPU tensors under Triton's interpreter."""
    yield torch.device("cpu" if interpret.active() else "cuda")
    if not interpret.active():
        torch.cuda.synchronize()  # what a kernel broke is said of its own test, not of one that follows
