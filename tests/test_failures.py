"""`pytest --failures FILE`: what failed is on disk while the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Failures


def report(name: str, outcome: Any, why: str | None, when: Any = "call") -> pytest.TestReport:
    return pytest.TestReport(name, ("file", 1, name), {}, outcome, why, when, duration=1.25)


def test_failures_are_written_as_they_come(tmp_path: Path):
    file = tmp_path / "new" / "failures.txt"
    log = Failures(file)
    log.pytest_runtest_logreport(report("test_right", "passed", None))
    log.pytest_runtest_logreport(report("test_wrong", "failed", "assert 1 == 2\nbecause of this\n"))
    written = "test_wrong (call, 1.2 s, test 2): assert 1 == 2 | because of this\n"
    assert file.read_text() == written
    log.pytest_runtest_logreport(report("test_never_began", "failed", "no device", when="setup"))
    log.pytest_sessionfinish(1)
    assert file.read_text() == written + (
        "test_never_began (setup, 1.2 s, test 2): no device\n2 tests ended, status 1\n"
    )
