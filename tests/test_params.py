from dataclasses import dataclass
from typing import Literal

import pytest

from tinyllm.errors import ParamsError
from tinyllm.params import build_params, load_params, to_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    lr: float
    steps: int
    mode: Literal["cosine", "wsd"]
    names: tuple[str, ...]
    size: int | None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: must be at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ByPackage:
    kind: Literal["pypi"]
    spec: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ByPath:
    kind: Literal["file"]
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    seed: int
    sft: Inner


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    sources: dict[str, ByPackage | ByPath]


GOOD = {"lr": 3e-5, "steps": 10, "mode": "wsd", "names": ["a"], "size": None}


def write(path, text):
    path.write_text(text)
    return path


def problems(**changes):
    with pytest.raises(ParamsError) as caught:
        build_params(Params, {"seed": 1, "sft": {**GOOD, **changes}}, "params.yaml")
    return str(caught.value)


def test_reads_only_the_declared_sections_and_yaml_1_2_floats(tmp_path):
    text = (
        "seed: 1\nother: {x: y}\nsft: {lr: 3e-05, steps: 10, mode: wsd, names: [a], size: null}\n"
    )
    params = load_params(Params, write(tmp_path / "params.yaml", text))
    assert params == Params(
        seed=1, sft=Inner(lr=3e-5, steps=10, mode="wsd", names=("a",), size=None)
    )


def test_all_problems_are_told_at_once_with_their_path():
    with pytest.raises(ParamsError) as caught:
        build_params(
            Params,
            {
                "seed": "x",
                "sft": {"lr": "3e-5", "step": 1, "mode": "wdc", "names": ["a"], "size": 0},
            },
            "params.yaml",
        )
    lines = str(caught.value).splitlines()
    assert "params.yaml: seed: expected int, got str 'x'" in lines
    assert "params.yaml: sft.step: unknown parameter; did you mean steps?" in lines
    assert "params.yaml: sft.steps: missing; add it to the file" in lines
    assert "params.yaml: sft.lr: expected float, got str '3e-5'" in lines
    assert any("sft.mode: 'wdc' is not one of cosine, wsd" in line for line in lines)
    assert len(lines) == 5


def test_a_bool_is_no_number_and_an_int_is_a_float():
    assert "sft.lr: expected float, got bool True" in problems(lr=True)
    assert "sft.steps: expected int, got bool True" in problems(steps=True)
    assert build_params(Inner, {**GOOD, "lr": 1}, "x").lr == 1.0


def test_null_only_where_it_is_allowed():
    assert "sft.steps: expected int, got null" in problems(steps=None)


def test_what_a_dataclass_refuses_gets_its_path():
    assert problems(steps=0) == "params.yaml: sft.steps: must be at least 1, got 0"


def test_list_items_are_checked_one_by_one():
    assert "sft.names[1]: expected str, got int 3" in problems(names=["a", 3])


def test_a_mapping_of_kinds_picks_the_dataclass():
    values = {"sources": {"a": {"kind": "file", "path": "p"}, "b": {"kind": "pypi", "spec": "s"}}}
    sources = build_params(Sources, values, "x").sources
    assert sources == {"a": ByPath(kind="file", path="p"), "b": ByPackage(kind="pypi", spec="s")}
    assert to_plain(sources) == values["sources"]
    with pytest.raises(
        ParamsError, match="sources.a.kind: 'pyp' is not one of pypi, file; did you"
    ):
        build_params(Sources, {"sources": {"a": {"kind": "pyp", "spec": "s"}}}, "x")


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path, text):
    with pytest.raises(ParamsError) as caught:
        load_params(Params, write(tmp_path / "p.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ParamsError, match="no such file"):
        load_params(Params, tmp_path / "none.yaml")
