"""What tests of kernels share: the device that they run on, and references in float64."""

from __future__ import annotations

import pytest
import torch

from rewrite.codegen.kernels import interpret, plans


@pytest.fixture(scope="session", autouse=True)
def repaired() -> None:
    """Triton's interpreter with its bfloat16 made right, where kernels are interpreted."""
    pytest.importorskip("triton")
    if interpret.active():
        interpret.repair()


@pytest.fixture(autouse=True)
def planned_anew() -> None:
    """No plan of another test, which may have changed what plans take for fixed."""
    plans.forget()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU, or CPU tensors under Triton's interpreter."""
    return torch.device("cpu" if interpret.active() else "cuda")
