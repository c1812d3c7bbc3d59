"""The floors import downwards only, codegen < passes < runtime < rewrite, and always by absolute names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["codegen", "passes", "runtime", "rewrite"]
LEAVES = {"rewrite.errors", "rewrite.version"}  # everybody may import these, and they import nobody
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imports(source: str):
    """Every name that `source` imports; a relative one keeps its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def forbidden(name: str, floor: int) -> bool:
    top, _, rest = name.partition(".")
    if top != "rewrite":
        return top == "" or top in FLOORS
    is_leaf = ".".join(name.split(".")[:2]) in LEAVES
    below = FLOORS[: floor + 1]
    return not (is_leaf or rest.split(".")[0] in below or "rewrite" in below)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    floor = -1 if name in LEAVES else FLOORS.index(path.relative_to(ROOT).parts[0])
    assert [each for each in imports(path.read_text(encoding="utf-8")) if forbidden(each, floor)] == []


@pytest.mark.parametrize("floor", FLOORS)
def test_every_floor_is_read(floor: str):
    assert any(path.is_relative_to(ROOT / floor) for path in FILES)


@pytest.mark.parametrize(
    ("line", "floor", "expected"),
    [
        ("from rewrite.runtime.graft import Graft", "passes", True),
        ("import rewrite.passes.rule", "codegen", True),
        ("from rewrite import spec", "runtime", True),
        ("import rewrite", "runtime", True),
        ("from .delta import LowRank", "codegen", True),
        ("import passes", "rewrite", True),
        ("def f():\n    from rewrite.spec import parse", "runtime", True),
        ("from rewrite.codegen import forms", "passes", False),
        ("from rewrite import errors", "codegen", False),
        ("from rewrite.errors import Error", "codegen", False),
        ("from rewrite.runtime.graft import Graft", "rewrite", False),
        ("import torch.fx", "codegen", False),
    ],
)
def test_the_check_itself(line: str, floor: str, expected: bool):
    assert any(forbidden(name, FLOORS.index(floor)) for name in imports(line)) is expected
