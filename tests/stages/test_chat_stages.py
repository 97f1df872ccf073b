"""chat_data, sft and lora on a tiny model, in a folder of their own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from chat_stages_case import (
    CHAT,
    SOURCE,
    TRAINING,
    contents,
    report,
    write_dialogues,
    write_model,
    write_params,
)

from stages import lora as lora_stage
from stages import sft as sft_stage
from stages.chat_data import chat_data
from stages.lora import lora
from stages.sft import sft
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, verify_files
from tinyllm.errors import DataError, LineageError, ParamsError
from tinyllm.finetune.adapter import load_adapter
from tinyllm.finetune.chat_task import ChatTask
from tinyllm.finetune.conversations import conversations_path, load_conversations
from tinyllm.finetune.examples import ChatBatches, encode_conversation
from tinyllm.finetune.replay import ChatTrainingParams
from tinyllm.model.directory import COPIED, load_model
from tinyllm.tokenizer.chat import ChatTemplate
from tinyllm.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the three stages have run."""
    folder = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("TINYLLM_INFLIGHT", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        shutil.copy(ROOT / "dvc.yaml", folder)
        write_params()
        write_dialogues()
        write_model()
        for stage in (chat_data, sft, lora):
            stage()
    return folder


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of it to change."""
    shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("TINYLLM_INFLIGHT", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)


def test_chat_data(project):
    manifest = load_manifest(paths.CHAT, "chat")
    verify_files(paths.CHAT, manifest)
    assert sorted(manifest.files) == [
        f"{part}/{split}.jsonl" for part in ("lora", "sft") for split in ("train", "val")
    ]
    assert set(manifest.lineage) == {"tokenizer"}
    metrics = report("chat_data")
    tokenizer, template = Tokenizer.load(paths.TOKENIZER), ChatTemplate.load(paths.TOKENIZER)
    for part, first in (("sft", "the"), ("lora", "my")):
        n_conversations = 0
        for split in ("train", "val"):
            found = load_conversations(conversations_path(paths.CHAT, part, split))
            examples = [encode_conversation(c, template, tokenizer, 48) for c in found]
            assert all(c.question.startswith(first) for c in found)
            assert metrics[part][split] == {
                "conversations": len(found),
                "turns": 2 * len(found),
                "tokens": sum(len(e.ids) + 1 for e in examples),
                "supervised_tokens": sum(len(e.answer_ids) for e in examples),
            }
            n_conversations += len(found)
        assert n_conversations == 24
    assert metrics["dropped"]["question_too_long"] == 0
    before = contents(paths.CHAT / "sft")
    chat_data()
    assert contents(paths.CHAT / "sft") == before


def test_sft_writes_a_model_directory_and_reports(project):
    manifest = load_manifest(paths.SFT, "sft")
    assert set(manifest.lineage) == {"tokenizer", "tokens", "pretrain", "chat"}
    for name in COPIED:
        assert (paths.SFT / name).read_bytes() == (paths.PRETRAIN / name).read_bytes()
    metrics = report("sft")
    assert metrics["val_loss"] < metrics["val_loss_before"]
    assert metrics["val_bpb"] < metrics["val_bpb_before"]
    assert 0 <= metrics["ended_share"] <= 1
    samples = report("sft", "samples.json")
    assert [sample["step"] for sample in samples] == [0, 3, 6]
    questions = [
        [line for line in sample["text"].splitlines() if line.startswith("> ")]
        for sample in samples
    ]
    assert questions[0] == questions[1] == questions[2]
    held_out = load_conversations(conversations_path(paths.CHAT, "sft", "val"))
    assert {question[2:] for question in questions[0]} <= {c.question for c in held_out}
    header, *rows = (paths.REPORTS / "sft" / "curve.tsv").read_text().splitlines()
    assert {"step", "train_loss", "val_loss", "val_bpb"} <= set(header.split("\t"))
    assert [row.split("\t")[0] for row in rows] == ["0", "2", "4", "6"]


def test_the_loss_is_that_of_the_held_out_answers(project):
    """Against -ln p added up token by token, one conversation at a time."""
    tokenizer, template = Tokenizer.load(paths.SFT), ChatTemplate.load(paths.SFT)
    model, nats, n_tokens, n_bytes = load_model(paths.SFT), 0.0, 0, 0
    for conversation in load_conversations(conversations_path(paths.CHAT, "sft", "val")):
        ids, learned = template.encode(conversation.messages, tokenizer)
        with torch.no_grad():
            log_p = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if learned[t]:
                nats -= log_p[t - 1, ids[t]].item()
                n_tokens += 1
        n_bytes += sum(len(m.content.encode()) for m in conversation.messages[1::2])
    metrics = report("sft")
    assert metrics["val_loss"] == pytest.approx(nats / n_tokens, rel=1e-5)
    assert metrics["val_bpb"] == pytest.approx(nats / 0.6931471805599453 / n_bytes, rel=1e-5)


def test_lora_writes_the_adapter_and_the_sum(project):
    adapter, merged = load_manifest(paths.LORA_ADAPTER, "adapter"), load_manifest(paths.LORA_MERGED)
    assert set(adapter.lineage) == {"tokenizer", "tokens", "pretrain", "chat", "sft"}
    assert set(merged.lineage) == {*adapter.lineage, "adapter"}
    assert merged.kind == "lora"
    assert merged.lineage["adapter"] == adapter.digest
    ids = torch.arange(6, 46)[None]
    with torch.no_grad():
        base, whole = load_model(paths.SFT), load_model(paths.LORA_MERGED)(ids)
        assert (base(ids) - whole).abs().max() > 1e-3
        adapted = load_adapter(base, paths.LORA_ADAPTER)(ids)
    # 20 roundings of 6e-8 in any pass, and three more in each of four adapted layers
    tolerance = (20 + 4 * 3) * 6e-8 * whole.abs().max().item()
    torch.testing.assert_close(adapted, whole, atol=tolerance, rtol=0)
    metrics = report("lora")
    assert metrics["val_bpb"] < metrics["val_bpb_before"]
    per_layer = 2 * (32 + 32) + 2 * (64 + 32)  # rank (inputs + outputs) of q_proj and down_proj
    n_base = sum(p.numel() for p in load_model(paths.SFT).parameters())
    assert metrics["trainable_share"] == 2 * per_layer / (n_base + 2 * per_layer)


@pytest.mark.parametrize(
    ("stage", "folders", "micro_batch"),
    [(sft, ["SFT"], 3), (lora, ["LORA_ADAPTER", "LORA_MERGED"], 9)],
)
def test_a_run_that_broke_ends_with_the_same_bytes(
    project, monkeypatch, stage, folders, micro_batch
):
    undisturbed = [contents(getattr(paths, folder)) for folder in folders]
    shutil.rmtree(paths.inflight_root())
    whole = ChatBatches.batch

    def broken(self, index):
        if index == micro_batch:
            raise KeyboardInterrupt
        return whole(self, index)

    monkeypatch.setattr(ChatBatches, "batch", broken)
    with pytest.raises(KeyboardInterrupt):
        stage()
    asked = []

    def watched(self, index):
        asked.append(index)
        return whole(self, index)

    monkeypatch.setattr(ChatBatches, "batch", watched)
    stage()
    assert asked[0] == micro_batch // 2 * 2  # the first of its step: steps before are not repeated
    assert [contents(getattr(paths, folder)) for folder in folders] == undisturbed


def test_another_tokenizer_is_refused_before_training(project, monkeypatch):
    for stage in (sft_stage, lora_stage):
        monkeypatch.setattr(stage, "train", lambda *_, **__: pytest.fail("trained"))
    old_model, old_sft = Path("old"), contents(paths.SFT)
    shutil.copytree(paths.PRETRAIN, old_model)
    write_model(seed=1)
    chat_data()  # dialogues of the new tokenizer
    shutil.rmtree(paths.PRETRAIN)
    shutil.copytree(old_model, paths.PRETRAIN)
    for stage, kind in ((sft, "tokenizer"), (lora, "chat")):
        with pytest.raises(LineageError, match=f"do not belong together: {kind}"):
            stage()
    assert contents(paths.SFT) == old_sft


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"sft": {"seq_len": 97}}, DataError, "sft.seq_len: 97 is more than the 96 tokens of data"),
        ({"sft": {"seq_len": 40}}, DataError, "sft.seq_len: 40 is too short for conversations of"),
        ({"sft": {"lr": -1.0}}, ParamsError, "sft.lr: must be above 0"),
        ({"lora": {"targets": ["qproj"]}}, ParamsError, "did you mean q_proj?"),
        ({"lora": {"rank": 0}}, ParamsError, "lora.rank: must be at least 1"),
        ({"chat": {"val_share": 1e-9}}, DataError, "no val conversations for sft, which has 24"),
        ({"chat": {"lora_topics": ["mne"]}}, DataError, "did you mean mine?"),
        ({"chat": {"sources": {"x": {**SOURCE, "path": "talk.yml", "format": "txt"}}}},
         ParamsError, "chat.sources.x.format: 'txt' has no conversations"),
    ],
)  # fmt: skip
def test_bad_parameters_leave_everything_as_it_was(project, sections, error, message):
    write_params(**sections)
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    stage = {"chat": chat_data, "sft": sft, "lora": lora}[next(iter(sections))]
    with pytest.raises(error) as raised:
        stage()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conversations: []", "no conversations of 'mine'"),
        ("conversations: [[alone]]", "no conversations of 'mine'"),
        ("hello", "has no list `conversations`"),
    ],
)
def test_empty_dialogues_are_refused(project, text, message):
    Path("talk.yml").write_text(text)
    Path("mine.jsonl").write_text("")
    with pytest.raises(DataError) as error:
        chat_data()
    expected = "no conversation with an answer" if "conversations" in text else message
    assert expected in str(error.value)


def test_dialogues_that_were_changed_are_refused(project):
    path = conversations_path(paths.CHAT, "sft", "val")
    path.write_bytes(path.read_bytes().replace(b"it is", b"it os"))
    with pytest.raises(Exception, match=r"sft/val\.jsonl: differs from its manifest"):
        sft()


def test_a_model_that_learned_its_answers_says_them_and_stops(project):
    """Held-out questions that were also trained on: the sampled answers are the right ones."""
    val, train = (conversations_path(paths.CHAT, "sft", split) for split in ("val", "train"))
    rows = train.read_text().splitlines()[:3]
    copies = {"sft/train.jsonl": "\n".join(rows) + "\n", "sft/val.jsonl": "\n".join(rows) + "\n"}
    assert val.exists()
    with build_artifact(paths.CHAT, kind="chat", made_from=[paths.TOKENIZER], config=CHAT) as draft:
        (draft.path / "sft").mkdir()
        for name, text in copies.items():
            (draft.path / name).write_text(text)
    values = {
        **TRAINING,
        "steps": 60,
        "accumulate": 1,
        "lr": 1e-2,
        "sample_every": 0,
        "replay_rows": 0,
    }
    write_params(sft={name: values[name] for name in TRAINING})
    sft()
    params = ChatTrainingParams(**values)
    task = ChatTask(paths.CHAT, "sft", paths.PRETRAIN, paths.TOKENS, params)
    answers = task.answers(load_model(paths.SFT))
    wanted = [json.loads(row)["messages"] for row in rows]
    assert [(a.question, a.answer, a.ended) for a in answers] == [
        (question["content"], answer["content"], True) for question, answer in wanted
    ]
    assert report("sft")["ended_share"] == 1.0
    assert not any(a.ended for a in task.answers(load_model(paths.PRETRAIN)))
