"""A real DVC repository in a temporary folder: this working tree, a tiny corpus, a tiny model."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent.parent
STEPS = 200
NOUNS = (
    "king",
    "queen",
    "river",
    "mountain",
    "horse",
    "sword",
    "letter",
    "garden",
    "winter",
    "ship",
)
VERBS = ("sees", "finds", "carries", "remembers", "follows", "loses", "greets", "paints", "hides")
ENDS = ("in the morning", "before the war", "with the others", "and that is all", "to be sure")


@dataclass(frozen=True)
class Project:
    """The temporary repository and the environment its commands run in."""

    root: Path
    environment: dict[str, str]

    def run(
        self, *command: str, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        # files, not pipes: the worker that `dvc queue start` leaves behind would hold a pipe open
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            env = {**self.environment, **variables}
            ended = subprocess.run(
                command, cwd=self.root, env=env, stdout=out, stderr=err, timeout=900
            )
            out.seek(0)
            err.seek(0)
            done = subprocess.CompletedProcess(command, ended.returncode, out.read(), err.read())
        if check:
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def set(self, **values: object) -> None:
        """Change parameters by dotted path; `sft__lr=1e-3` is sft.lr."""
        yaml = YAML()
        document = yaml.load(self.root / "params.yaml")
        for name, value in values.items():
            *sections, key = name.split("__")
            node = document
            for section in sections:
                node = node[section]
            node[key] = value
        yaml.dump(document, self.root / "params.yaml")

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def stages_run(self, done: subprocess.CompletedProcess[str]) -> list[str]:
        lines = (done.stdout + done.stderr).splitlines()
        return [line.split("'")[1] for line in lines if line.startswith("Running stage ")]


def write_corpus(folder: Path) -> None:
    """Write 40 different documents of plain sentences, and 60 small conversations."""
    draw = random.Random(7)
    folder.mkdir()
    for i in range(40):
        sentences = (
            f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)} of the"
            f" {draw.choice(NOUNS)} {draw.choice(ENDS)}, and {draw.choice(NOUNS)}s"
            f" have {draw.randrange(2, 99)} {draw.choice(NOUNS)}s."
            for _ in range(60)
        )
        (folder / f"tale-{i:02}.txt").write_text("\n".join(sentences))
    for topic in ("stars", "bread"):
        pairs = "\n".join(
            f"- - What is {topic} number {i}?\n  - It is a {draw.choice(NOUNS)}, I think."
            for i in range(30)
        )
        (folder / f"{topic}.yml").write_text(f"conversations:\n{pairs}\n")


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """The repository, committed, nothing run yet."""
    root = tmp_path_factory.mktemp("template") / "repo"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (
            (ROOT / name).is_file()
            and not name.startswith(("reports/", "docs/"))
            and name != "dvc.lock"
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    write_corpus(root / "corpus")
    project = Project(root, environment(root.parent))
    shrink(project)
    project.run("git", "init", "-q", "-b", "main")
    project.run("git", "config", "user.name", "test")
    project.run("git", "config", "user.email", "test@localhost")
    project.commit("template")
    return root


def shrink(project: Project) -> None:
    """Make the pipeline a matter of seconds."""
    source = {"kind": "file", "sha256": None, "members": None, "encoding": "utf-8"}
    source |= {"text_field": None}
    training = {"steps": STEPS, "seq_len": 32, "batch_size": 4, "warmup_steps": 2, "save_every": 5}
    training |= {"eval_every": 50, "sample_every": 0, "log_every": 1, "compile": "off"}
    stages = ("pretrain", "sft", "lora")
    project.set(
        data__sources={"tales": {**source, "path": "corpus/*.txt", "format": "txt"}},
        clean__val_documents=["tale-03", "tale-17"],
        clean__languages=[],
        clean__top_n_grams={},  # forty words in all orders repeat themselves
        clean__dup_n_grams={},
        tokenizer__vocab_size=400,
        prune__vocab_size=360,
        model__d=32,
        model__n_layers=1,
        model__n_heads=2,
        model__max_seq_len=64,
        chat__sources={"talks": {**source, "path": "corpus/*.yml", "format": "yaml"}},
        chat__alternative_topics=[],
        chat__lora_topics=["bread"],
        chat__max_tokens=32,
        quantize__seq_len=32,
        quantize__max_bpb_increase_share=0.05,  # a model of 17,000 weights has none to spare
        export__prompts=1,
        export__prompt_tokens=8,
        export__greedy_tokens=10,
        benchmark__prompt_tokens=8,
        benchmark__decode_tokens=4,
        benchmark__decode_no_cache_tokens=2,
        benchmark__rounds=1,
        benchmark__eval_tokens=500,
        benchmark__eval_seq_len=32,
        **{f"{stage}__{key}": value for stage in stages for key, value in training.items()},
    )


def environment(base: Path) -> dict[str, str]:
    """An environment in which DVC touches nothing outside `base` and no network is used."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("DVC")}
    return {
        **variables,
        "PATH": f"{Path(sys.executable).parent}:{variables['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(base / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(base / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(base / "system"),
        "TINYLLM_OFFLINE": "1",
        "TINYLLM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "COLUMNS": "200",
    }


@pytest.fixture(scope="session")
def built(template) -> Path:
    """The repository after a first `dvc repro`, committed."""
    root = template.parent / "built"
    shutil.copytree(template, root)
    project = Project(root, environment(root.parent))
    project.run("dvc", "repro")
    project.commit("built")
    return root


@pytest.fixture
def fresh(template, tmp_path) -> Project:
    """A copy of the repository in which nothing has run."""
    shutil.copytree(template, tmp_path / "repo")
    return Project(tmp_path / "repo", environment(tmp_path))


@pytest.fixture
def project(built, tmp_path) -> Project:
    """A copy of the repository in which everything has run."""
    shutil.copytree(built, tmp_path / "repo")
    return Project(tmp_path / "repo", environment(tmp_path))
