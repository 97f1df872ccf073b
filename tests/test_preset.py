import math
import shutil
from pathlib import Path

import pytest
import torch
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides

from tinyllm.errors import ParamsError
from tinyllm.model.init import count_parameters
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, read_yaml
from tinyllm.preset import apply_preset, check_params, merge, preset_arguments, sections

ROOT = Path(__file__).parent.parent
PRESETS = ROOT / "presets"
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.fixture
def params(tmp_path):
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


def write_preset(tmp_path: Path, text: str) -> Path:
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path


def test_the_shipped_presets_are_there():
    assert {"smoke", "small", "medium", "large", "library", "tinystories", "fineweb-edu"} <= set(
        NAMES
    )
    assert {"mla", "medium-24gb", "large-8gb"} <= set(NAMES)


@pytest.mark.parametrize(
    ("names", "millions"),
    [
        (["small"], (9, 11)),
        (["medium"], (80, 92)),
        (["large"], (340, 360)),
        (["medium", "medium-24gb"], (80, 92)),
        (["large", "large-8gb"], (340, 360)),
        (["small", "mla"], (9, 11)),
        (["medium", "mla"], (80, 95)),
        (["large", "mla"], (340, 370)),
    ],
)
def test_presets_have_the_parameters_that_they_name(names, millions):
    document = read_yaml(ROOT / "params.yaml")
    tokens_per_step = []
    for name in names:
        document = merge(document, read_yaml(PRESETS / f"{name}.yaml"), name)
        training = document["pretrain"]
        sizes = [training[size] for size in ("batch_size", "accumulate", "seq_len")]
        tokens_per_step.append(math.prod(sizes))
    model = build_params(ModelParams, document["model"], "params.yaml")
    config = resolve(model, document["prune"]["vocab_size"])
    with torch.device("meta"):
        n_parameters = count_parameters(Transformer(config))
    assert millions[0] <= n_parameters / 1e6 <= millions[1]
    assert len(set(tokens_per_step)) == 1  # a card changes the pieces, not the training


def test_every_section_is_declared_by_a_stage():
    assert list(read_yaml(ROOT / "params.yaml")) == [
        name for name in read_yaml(ROOT / "params.yaml") if name in sections()
    ]
    assert check_params(ROOT / "params.yaml") == len(sections())


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_merges_into_valid_params_with_all_comments(params, name):
    before = params.read_text()
    changed = apply_preset(name, PRESETS, params)
    check_params(params)
    overlay = read_yaml(PRESETS / f"{name}.yaml")
    for section, values in overlay.items():
        for key, value in values.items():
            assert read_yaml(params)[section][key] == value
    untouched = [line for line in before.splitlines() if line in params.read_text().splitlines()]
    assert len(before.splitlines()) - len(untouched) <= len(changed) + 8  # 8: lines of a source
    for line in before.splitlines():
        if line and not line.startswith(" ") and "#" in line:
            assert line in params.read_text()
    assert apply_preset(name, PRESETS, params) == [f"{params}: already as {name} wants it"]


@pytest.mark.parametrize("name", ["smoke", "library", "tinystories"])
def test_its_arguments_give_dvc_the_same_values(params, tmp_path, name):
    words = preset_arguments(name, PRESETS, params)
    assert set(words[::2]) == {"-S"}
    assert not any(set(word) & set(" \t\n") for word in words)
    theirs = Path(shutil.copy(params, tmp_path / "theirs.yaml"))
    apply_overrides(theirs, to_path_overrides(words[1::2])["params.yaml"])
    apply_preset(name, PRESETS, params)
    assert read_yaml(theirs) == read_yaml(params)


def test_sources_are_replaced_and_all_else_is_merged(params, tmp_path):
    source = (
        "{kind: file, path: a.txt, sha256: null,"
        " format: txt, members: null, encoding: utf-8, text_field: null}"
    )
    presets = write_preset(tmp_path, f"data: {{sources: {{mine: {source}}}}}\nmodel: {{d: 128}}\n")
    assert apply_preset("mine", presets, params) == [
        "data.sources: {shakespeare} -> {mine}",
        "model.d: 256 -> 128",
    ]
    after = read_yaml(params)
    assert list(after["data"]["sources"]) == ["mine"]
    assert after["data"]["max_documents"] is None
    assert (after["model"]["d"], after["model"]["n_layers"]) == (128, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dd: 64}", r"mine.yaml: model.dd: unknown parameter; did you mean d?"),
        ("modle: {d: 64}", r"mine.yaml: modle: unknown parameter; did you mean model?"),
        ("model: {d: wide}", r"mine.yaml: model.d: expected int, got str 'wide'"),
        ("model: {n_heads: 3}", r"mine.yaml: model.n_heads: 3 does not divide d = 256"),
        ("model: 3", r"mine.yaml: model: expected a mapping"),
    ],
)
def test_a_wrong_preset_is_refused_and_changes_nothing(params, tmp_path, text, message):
    presets = write_preset(tmp_path, text)
    before = params.read_bytes()
    for act in (apply_preset, preset_arguments):
        with pytest.raises(ParamsError) as caught:
            act("mine", presets, params)
        assert message in str(caught.value)
    assert params.read_bytes() == before


def test_an_unknown_name_gets_a_hint_and_the_list(params):
    with pytest.raises(
        ParamsError, match=r"smoek.yaml: no such preset; did you mean smoke\?.* large"
    ):
        apply_preset("smoek", PRESETS, params)


def test_what_one_word_cannot_say_is_refused(params, tmp_path):
    presets = write_preset(tmp_path, "clean: {drop_lines: ['two words']}")
    with pytest.raises(
        ParamsError, match=r"clean.drop_lines has a space in it.*tinyllm preset mine"
    ):
        preset_arguments("mine", presets, params)
    apply_preset("mine", presets, params)
    assert read_yaml(params)["clean"]["drop_lines"] == ["two words"]


def test_merge_leaves_its_arguments_alone(params):
    document = read_yaml(params)
    merge(document, {"model": {"d": 128}}, "here")
    assert document == read_yaml(params)
