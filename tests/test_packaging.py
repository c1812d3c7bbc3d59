"""What is installed is what is on disk, under the names that the metadata promises."""

import configparser
import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from rewrite.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
FLOORS = ["passes", "codegen", "runtime"]
BACKENDS = PROJECT["entry-points"]["torch_dynamo_backends"]
ENVIRONMENT = runpy.run_path(str(ROOT / "tools" / "environment.py"))


def installed_as(path: Path) -> str:
    """rewrite/spec.py -> rewrite/spec.py, but passes/rule.py -> rewrite/passes/rule.py."""
    inside = path.relative_to(ROOT).as_posix()
    return inside if inside.startswith("rewrite/") else f"rewrite/{inside}"


def on_disk(*patterns: str) -> set[str]:
    """Installed names of the files of all floors; links are not followed, so each file counts once."""
    roots = [ROOT / name for name in ["rewrite", *FLOORS]]
    return {
        installed_as(Path(folder, name))
        for root in roots
        for folder, _, names in os.walk(root)
        for name in names
        if any(Path(name).match(pattern) for pattern in patterns)
    }


def test_packages_are_the_folders_on_disk():
    folders = {str(Path(name).parent).replace("/", ".") for name in on_disk("*.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    assert all(f"{folder.replace('.', '/')}/__init__.py" in on_disk("*.py") for folder in folders)


def test_package_dir_covers_every_floor():
    floors = {f"rewrite.{floor}": floor for floor in FLOORS}
    assert SETUPTOOLS["package-dir"] == {"rewrite": "rewrite", **floors}


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_is_linked_into_rewrite(floor: str):
    link = ROOT / "rewrite" / floor
    assert os.readlink(link) == f"../{floor}"
    assert link.is_dir()


@pytest.mark.parametrize("floor", FLOORS)
def test_bare_name_is_refused(floor: str):
    with pytest.raises(ImportError, match=f"^import rewrite.{floor}, not {floor}$"):
        importlib.import_module(floor)


@pytest.mark.parametrize("target", [*PROJECT["scripts"].values(), *BACKENDS.values()])
def test_entry_point_resolves(target: str):
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_version_is_stated_once():
    assert "version" in PROJECT["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"]["attr"] == "rewrite.version.__version__"
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_module_prints_the_version():
    command = [sys.executable, "-m", "rewrite", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy: setuptools writes beside its sources, and reads what it once wrote."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ["rewrite", *FLOORS]:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tree.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_every_file_once_and_nothing_else(wheel: zipfile.ZipFile):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(on_disk("*.py", "py.typed", "*.j2", "*.cpp", "*.h"))


def test_wheel_metadata(wheel: zipfile.ZipFile):
    info = f"peft_rewrite-{__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode().splitlines()
    assert {"Name: peft-rewrite", f"Version: {__version__}", "License-Expression: Apache-2.0"} <= set(metadata)
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entries["console_scripts"]) == PROJECT["scripts"]
    assert dict(entries["torch_dynamo_backends"]) == BACKENDS


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.11.0", True),
        ("2.11.0+cu130", True),
        ("2.13.9", True),
        ("2.12.0a0+gitabc", True),
        ("2.11.0a0+gitabc", False),
        ("2.11.0.dev20260101", False),
        ("2.10.1", False),
        ("2.9.0", False),
        ("2.14.0", False),
        ("2.14.0.dev20270101+cpu", False),
        ("3.0.0", False),
        ("", False),
    ],
)
def test_environment_uses_a_torch_in_range(version: str, expected: bool):
    assert ENVIRONMENT["in_range"](version) is expected


def test_environment_installs_a_torch_in_range():
    assert ENVIRONMENT["in_range"](ENVIRONMENT["TORCH"])
