import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"errors", "paths", "progress"},
    {"params", "artifact", "report"},
    {"corpus", "ops", "tokenizer"},
    {"shards", "model"},
    {"training", "inference", "quantization"},
    {"finetune", "evaluation", "export"},
    {"serving"},
    {"cli", "terminal", "planning", "doctor", "parity", "preset", "workshop"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
ENTRY_FLOOR = len(FLOORS) - 1
LIBRARY = sorted((ROOT / "tinyllm").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "tinyllm").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_lower_floors(path):
    package = package_of(path)
    if package == "__init__":
        return
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "stages":
            assert FLOOR[package] == ENTRY_FLOOR, f"{package} imports {module}"
        if parts[0] != "tinyllm" or len(parts) < 2 or parts[1] == package:
            continue
        floor = FLOOR[parts[1]]
        same_plumbing = floor == FLOOR[package] and floor in (0, 1, ENTRY_FLOOR)
        assert floor < FLOOR[package] or same_plumbing, f"{package} imports {module}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_top_floor_talks_to_the_terminal(path):
    package = package_of(path)
    if package != "__init__" and FLOOR[package] < ENTRY_FLOOR:
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert not roots & {"typer", "rich", "argparse", "dvc"}


@pytest.mark.parametrize("path", sorted((ROOT / "tinyllm").rglob("__init__.py")), ids=str)
def test_packages_are_a_docstring_and_nothing_else(path):
    (only,) = ast.parse(path.read_text()).body
    assert isinstance(only, ast.Expr)


def test_kernels_is_no_python_package():
    assert not list((ROOT / "kernels").rglob("__init__.py"))
