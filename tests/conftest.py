"""What every test shares: fixed seeds, a clean Dynamo, no network, golden files, and where GPU tests run."""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
# Before torch is imported. The tensors here are tiny: a second thread only waits, and on a busy machine it waits long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):  # no GPU: Triton's kernels run on CPU tensors, which it decides when imported
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")
    parser.addoption("--failures", metavar="FILE", help="write a line for every failure as it comes, and a count")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--failures")
    if path and not hasattr(config, "workerinput"):  # one file, whichever process a test runs in
        config.pluginmanager.register(Failures(Path(path)))


class Failures:
    """What failed, on disk at once: pytest says it at the end, which a run that is cut off has not."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8", buffering=1)
        self.ended = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ended += report.when == "call"
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
            seconds = f"{report.duration:.1f} s, test {self.ended}"
            self.file.write(f"{report.nodeid} ({report.when}, {seconds}): {' | '.join(lines[:4])}\n")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.file.write(f"{self.ended} tests ended, status {int(exitstatus)}\n")
        self.file.close()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":  # the tests of kernels run on the device, where there is one
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """The same random numbers, and nothing compiled before, whichever tests ran earlier."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        sys.modules["numpy"].random.seed(0)
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compares text with tests/golden/<module>/<test>.txt; `pytest --update-golden` writes the file anew.

    `golden(str(diff))`, and `golden(str(diff), "html")` for a second text in the same test.
    """

    def check(text: str, suffix: str = "") -> None:
        name = re.sub(r"[^\w.=-]+", "_", f"{request.node.name}{'-' + suffix if suffix else ''}")
        path = TESTS / "golden" / request.path.relative_to(TESTS).with_suffix("") / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        known = path.read_text(encoding="utf-8") if path.exists() else ""
        shown = path.relative_to(TESTS.parent)
        assert text == known, f"differs from {shown}; if the new text is right: pytest --update-golden"

    return check
