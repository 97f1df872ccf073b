"""dvc.yaml against the code: what a stage imports, reads and writes is what it declares."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

from tinyllm import paths
from tinyllm.params import read_yaml

ROOT = Path(__file__).parent.parent
PIPELINE = read_yaml(ROOT / "dvc.yaml")["stages"]
STAGES = sorted(PIPELINE)
ORDER = [
    "download",
    "clean",
    "train_tokenizer",
    "prune_vocab",
    "encode",
    "pretrain",
    "chat_data",
    "sft",
    "lora",
    "quantize",
    "export",
    "benchmark",
    "report",
]
INFRASTRUCTURE = {
    f"tinyllm/{name}.py"
    for name in ("__init__", "errors", "paths", "progress", "params", "artifact", "report")
} | {f"stages/{name}.py" for name in ("__init__", "runner", "console", "identity", "ranks")}


def module_file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def import_closure(stage: str) -> set[str]:
    todo, seen = [ROOT / "stages" / f"{stage}.py"], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        for name in names:
            if name.split(".")[0] in ("tinyllm", "stages") and (found := module_file(name)):
                todo.append(found)
                package = found.parent / "__init__.py"
                todo += [package] if package.is_file() else []
    return {str(path.relative_to(ROOT)) for path in seen}


def code_deps(stage: str) -> set[str]:
    return {
        dep
        for dep in PIPELINE[stage]["deps"]
        if dep.split("/")[0] in ("tinyllm", "stages", "kernels")
    }


def covers(dep: str, path: str) -> bool:
    return path == dep or path.startswith(f"{dep}/")


def declared(stage: str, *kinds: str) -> list[str]:
    entries = [entry for kind in kinds for entry in PIPELINE[stage].get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def test_the_stages_are_those_of_the_design():
    assert set(STAGES) == set(ORDER)


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_import_closure(stage):
    closure = import_closure(stage) - INFRASTRUCTURE
    needed = {path for path in closure if not path.endswith("__init__.py")}  # a docstring each
    deps = code_deps(stage)
    missing = {path for path in needed if not any(covers(dep, path) for dep in deps)}
    assert not missing, f"{stage}: not declared in dvc.yaml"
    idle = {
        dep
        for dep in deps
        if dep.endswith(".py") or dep.startswith("tinyllm/")
        if not any(covers(dep, path) for path in needed)
    }
    assert not idle, f"{stage}: declared in dvc.yaml, but never imported"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_that_the_stage_reads(stage):
    module = importlib.import_module(f"stages.{stage}")
    kind = getattr(module, "Params", None)
    sections = [field.name for field in dataclasses.fields(kind)] if kind else []
    assert sorted(PIPELINE[stage].get("params", [])) == sorted(sections)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_one_command_without_options(stage):
    module = importlib.import_module(f"stages.{stage}")
    assert PIPELINE[stage]["cmd"] == f"python -m stages.{stage}"
    function = getattr(module, stage)
    assert function.__code__.co_argcount == function.__code__.co_kwonlyargcount == 0
    assert len(Path(module.__file__).read_text().splitlines()) <= 60


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_are_plain_and_reports_are_in_git(stage):
    for kind in ("outs", "metrics", "plots"):
        for entry in PIPELINE[stage].get(kind, []):
            options = {} if isinstance(entry, str) else next(iter(entry.values()))
            path = entry if isinstance(entry, str) else next(iter(entry))
            assert "persist" not in options
            assert options.get("cache", True) == (not path.startswith("reports/"))


def test_paths_are_those_of_the_pipeline():
    outputs = {path for stage in STAGES for path in declared(stage, "outs", "metrics", "plots")}
    artifacts = {
        str(value)
        for name, value in vars(paths).items()
        if name.isupper() and str(value).startswith("data/")
    }
    assert {path for path in outputs if path.startswith("data/")} == artifacts - {
        str(paths.LORA_ADAPTER),
        str(paths.LORA_MERGED),
    }
    assert str(paths.REPORT_PAGE) in outputs


@pytest.mark.parametrize("stage", STAGES)
def test_data_dependencies_are_made_by_earlier_stages(stage):
    before = ORDER[: ORDER.index(stage)]
    made = {path for earlier in before for path in declared(earlier, "outs", "metrics", "plots")}
    for dep in set(PIPELINE[stage]["deps"]) - code_deps(stage):
        assert any(covers(out, dep) or covers(dep, out) for out in made), dep
