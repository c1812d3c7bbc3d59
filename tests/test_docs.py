"""The code in docs/ and the examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import rewrite
from rewrite.catalogue import page

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if ">>>" in p.read_text(encoding="utf-8"))


def modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(rewrite.__path__, "rewrite.") if not m.name.endswith("__main__")]
    return [name for name in found if "templates" not in name]


# Dynamo's weak table complains when a page's lambdas die after `torch._dynamo.reset()` has emptied it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page(page):
    result = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    assert not doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed


def test_the_table_of_methods_is_the_registry():
    assert page(rewrite.methods().values()) in (ROOT / "docs/methods.md").read_text(encoding="utf-8")
