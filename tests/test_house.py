"""The house stands as it was designed: who imports whom, how long things are, what there is at the top."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("nanopref/**/*.py"), *ROOT.glob("kernels/*.py")]
TESTS = [*ROOT.glob("tests/**/*.py")]
# from the top of the house down; each floor imports only from its own and from those below
FLOORS = [
    {
        "train_ppo",
        "train_dpo",
        "nanopref.bench",
        "nanopref.evaluate",
        "nanopref.generate",
        "nanopref.people",
        "nanopref.memory",
    }
    | {"nanopref.experiments"},
    {"train_rm"},
    {"nanopref.sft"},
    {"nanopref.evaluation"},
    {"nanopref.feedback"},
    {"nanopref.models", "nanopref.learning"},
    {"nanopref.data"},
    {"nanopref.running"},
    {"nanopref"},
    {"kernels"},
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imports(name: str) -> set[str]:
    """The modules of this repository that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return (found & MODULES.keys()) - {name}


def floor(name: str) -> int:
    """0 is the top."""
    return min(i for i, names in enumerate(FLOORS) if any(name == n or name.startswith(f"{n}.") for n in names))


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name):
    assert {other for other in imports(name) if floor(other) < floor(name)} == set()


def test_there_is_no_circle():
    """Of modules that import one another at the top: each can be put after all that it needs. A package that gathers
    the names of its own modules is not waited for by them."""
    needs = {name: {x for x in imports(name) if not name.startswith(f"{x}.")} for name in MODULES}
    while ready := {name for name, wanted in needs.items() if not wanted}:
        needs = {name: wanted - ready for name, wanted in needs.items() if name not in ready}
    assert needs == {}


def test_kernels_stand_alone():
    for name, tree in MODULES.items():
        if name.split(".")[0] == "kernels":
            assert not {x for x in imports(name) if not x.startswith("kernels")}
            tops = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
            tops |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not tops & {"nanopref", "transformers", "tyro", "numpy", "safetensors"}, name


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_450_lines_at_most_and_a_function_120(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            longest = LONGEST.get((path.name, node.name), 120)
            assert node.end_lineno - node.lineno < longest, node.name


LONGEST: dict[tuple[str, str], int] = {}  # functions that may be longer, and why


def test_the_top_holds_what_the_design_says():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    names -= {"LICENSE", "out", "build", "dist", "__pycache__", "nanopref.egg-info", "shared"}
    expected = {"README.md", "pyproject.toml", "nanopref", "kernels", "tests"}
    assert names == expected | {"train_rm.py", "train_ppo.py", "train_dpo.py"}
