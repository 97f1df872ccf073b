import doctest
import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from report_case import write_manifests, write_reports

from stages.page.charts import line_chart, nice_ticks
from stages.page.facts import ARTIFACTS, STAGES, read_facts
from stages.page.render import render_page
from stages.report import report
from tinyllm import paths
from tinyllm.artifact import load_manifest
from tinyllm.errors import ArtifactError
from tinyllm.params import read_yaml

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}


class Reader(HTMLParser):
    """Checks nesting; keeps text, tags and attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_reports(root / "reports")
    write_manifests(root)
    return root


@pytest.fixture(scope="module")
def page(folder):
    return render_page(read_facts(folder / "reports", folder))


@pytest.fixture(scope="module")
def reader(page):
    return Reader(page)


def test_nothing_is_fetched_and_nothing_runs(page, reader):
    assert "http://" not in page
    assert "https://" not in page
    assert not {"script", "iframe", "link", "img", "object", "embed"} & set(reader.tags)
    names = {name for name, _ in reader.attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href"}
    assert "url(" not in page
    assert "@import" not in page


def test_text_of_models_is_escaped_and_whole(reader):
    text = "".join(reader.text)
    assert "<script>alert('x')</script> & so on," in text
    assert "Do you like <b>cheese</b>?" in text
    assert "&amp; lo" in text  # literally: the sample has it


def test_headline_numbers(reader):
    text = " ".join("".join(reader.text).split())
    for expected in ("1.988", "3.400 before fine-tuning", "2.600 before LoRA", "5.88 MB"):
        assert expected in text
    assert "fp32: 212.3; Imaginary CPU 9000" in text
    assert "5.18 M parameters, 6 layers of width 256, a vocabulary of 2,048" in text


def test_every_chapter_has_its_content(page, reader):
    text = "".join(reader.text)
    assert "not run yet" not in text
    for expected in (
        "near_duplicate",
        "transformers",
        "not installed: onnx",
        "down_proj",
        "lora_bf16",
    ):
        assert expected in text
    assert page.count("<svg") == 6  # loss and learning rate of three stages
    assert "A branch of science." in text


def test_digests_are_short_and_full_on_hover(folder, reader):
    digest = load_manifest(folder / paths.PRETRAIN).digest
    assert digest[:12] in "".join(reader.text)
    assert digest not in "".join(reader.text)
    assert ("title", f"{paths.PRETRAIN}: {digest}") in reader.attributes


def test_artifact_of_older_ancestors_is_marked(tmp_path):
    write_manifests(tmp_path)
    from tinyllm.artifact import build_artifact

    with build_artifact(tmp_path / paths.TOKENIZER, kind="tokenizer", made_from=[]):
        pass
    text = "".join(Reader(render_page(read_facts(tmp_path / "reports", tmp_path))).text)
    assert text.count("an older tokenizer") == 5  # tokens, pretrain, lora, int8, export


def test_same_facts_give_the_same_bytes(folder, page):
    assert render_page(read_facts(folder / "reports", folder)) == page


@pytest.mark.parametrize("stages", [[], ["download"], ["clean", "pretrain"], ["benchmark"]])
def test_what_has_not_run_is_said(tmp_path, stages):
    write_reports(tmp_path / "reports", stages)
    page = render_page(read_facts(tmp_path / "reports", tmp_path))
    reader = Reader(page)
    expected = {"benchmark": 10, "download": 10, "clean": 9}.get(stages[0], 0) if stages else 11
    assert "".join(reader.text).count("not run yet") == expected
    assert page.count('class="ran"') == len(stages)


def test_broken_report_is_named(tmp_path):
    write_reports(tmp_path / "reports", ["sft"])
    (tmp_path / "reports/sft/samples.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"sft/samples\.json: damaged: .*--force sft"):
        read_facts(tmp_path / "reports", tmp_path)


def test_stage_writes_the_page(folder, page, monkeypatch):
    monkeypatch.chdir(folder)
    report()
    assert paths.REPORT_PAGE.read_text(encoding="utf-8") == page


def test_declared_inputs_are_those_it_reads():
    pipeline = read_yaml(Path(__file__).parents[2] / "dvc.yaml")["stages"]["report"]
    deps = set(pipeline["deps"])
    assert {f"{path}/manifest.json" for path in ARTIFACTS} < deps
    assert {f"reports/{stage}/metrics.json" for stage in STAGES} < deps


def test_line_goes_through_its_points():
    rows = [
        {"step": 0, "a": 4.0},
        {"step": 10, "a": 2.0, "b": 3.0},
        {"step": 20, "a": float("nan")},
    ]
    chart = line_chart("loss", rows, ["a", "b", "c"])
    assert [series.name for series in chart.series] == ["a", "b"]
    (x0, y0), (x1, y1) = (map(float, p.split()) for p in chart.series[0].path[1:].split("L"))
    assert (x0, x1) == (0, 500)
    (b,) = re.findall(r"[\d.]+ ([\d.]+)", chart.series[1].path)
    assert float(b) == pytest.approx((y0 + y1) / 2, abs=0.1)  # 3 lies midway between 4 and 2
    assert y0 < y1  # y points down
    assert chart.bands[1].text == "step 10\na 2\nb 3"


@pytest.mark.parametrize("rows", [[], [{"step": 1.0}], [{"a": 2.0}]])
def test_nothing_to_draw_gives_no_chart(rows):
    assert line_chart("loss", rows, ["a"]) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.1, 7.6), (5, 5), (0, 0), (1, 9e9)])
def test_ticks_enclose_the_range_and_are_few(low, high):
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize("module", ["numbers", "charts", "parts"])
def test_examples_in_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"stages.page.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
