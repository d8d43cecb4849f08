"""What is installed: a wheel that holds everything; and beside Hugging Face's package of that name our `kernels`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("nanopref", "kernels")


def python(code: str, folder: Path, *path: Path) -> subprocess.CompletedProcess:
    """Python code run in a folder, with these first on sys.path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def sources(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for name in PACKAGES for path in (folder / name).rglob("*.py")}


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """An empty working directory."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture
def other(tmp_path) -> Path:
    """A folder for sys.path with another package named `kernels` in it."""
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    return tmp_path / "other"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The packages and what is needed to build them, without anything that was built."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    return tmp_path / "copy"


def refused(code: str, folder: Path, *path: Path) -> str:
    """What ImportError says, in one line."""
    done = python(code, folder, *path)
    assert done.returncode == 1
    kind, _, message = done.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "ImportError" and done.stderr.count("ImportError: ") == 1, done.stderr
    return message


def test_our_kernels_are_found_where_another_package_of_that_name_comes_first(elsewhere, other):
    code = "import kernels; assert hasattr(kernels, 'get_kernel')"
    assert python(code, elsewhere, other, ROOT).returncode == 0  # it does come first
    code = "import nanopref, kernels, kernels.reference; print(kernels.__file__, kernels.reference.__file__)"
    done = python(code, elsewhere, other, ROOT)
    ours = ROOT / "kernels"
    assert done.stdout.split() == [str(ours / "__init__.py"), str(ours / "reference.py")], done.stderr


def test_another_kernels_that_is_already_imported_is_named(elsewhere, other):
    message = refused("import kernels, nanopref", elsewhere, other, ROOT)
    assert f"Python found another one in {other / 'kernels'}: import nanopref before it" in message


def test_another_kernels_in_place_of_ours_is_named(elsewhere, other, copy):
    """As after `pip install kernels` where nanopref was installed before."""
    shutil.copy(other / "kernels" / "__init__.py", copy / "kernels")
    for code in ("import nanopref", "import kernels, nanopref"):
        message = refused(code, elsewhere, copy)
        assert f"another one in {copy / 'kernels'}: " in message and "pip uninstall kernels" in message


def test_a_wheel_holds_all_and_works_from_anywhere(tmp_path, copy, elsewhere, other):
    """Built by the hook that pip calls, and unpacked, which is what installing it does."""
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    built = python(code, copy)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    installed, found = tmp_path / "installed", sources(tmp_path / "installed")
    assert found == sources(ROOT)
    assert (installed / "nanopref" / "feedback" / "constitution.toml").is_file()
    assert (installed / "nanopref" / "people.html").is_file()
    assert {"data", "models", "feedback", "learning", "evaluation", "running"} <= {Path(f).parent.name for f in found}
    assert {path.name for path in installed.iterdir()} == {*PACKAGES, "nanopref-0.1.0.dist-info"}

    names = sorted(f.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for f in found)
    code = f"""
import importlib, nanopref
for name in {names}:
    print(importlib.import_module(name).__file__)
"""
    done = python(code, elsewhere, other, installed)  # where the other package is installed, too
    assert done.returncode == 0, done.stderr
    assert {str(Path(line).relative_to(installed)) for line in done.stdout.split()} == found
    assert not any(elsewhere.iterdir())
