"""The command line as a person meets it: pipes, mistakes, and a real pseudo-terminal."""

import io
import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pseudo_terminal import COMMAND, ENVIRONMENT, PATIENCE_S, Terminal
from tiny_dirs import write_model_dir
from tiny_text import made_up_text

from tinyllm.artifact import build_artifact
from tinyllm.cli import app, main
from tinyllm.export.hf import write_hf
from tinyllm.inference.cache import KVCache


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_dir(tmp_path_factory.mktemp("models") / "sft", max_seq_len=96)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: a new one takes two seconds to import torch."""
    monkeypatch.setenv("TINYLLM_DEVICE", "cpu")

    def run_command(*arguments, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.argv", ["tinyllm", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Done(ended.value.code, out, err)

    return run_command


def test_generate_is_repeatable_and_seeded(run, model_dir):
    first = run("generate", model_dir, "hello", "--max-tokens", 12)
    assert first.code == 0, first.stderr
    assert first.stdout.endswith("\n")
    assert len(first.stdout) > 5
    assert run("generate", model_dir, "hello", "--max-tokens", 12).stdout == first.stdout
    other = run("generate", model_dir, "hello", "--max-tokens", 12, "--seed", 1)
    assert other.stdout != first.stdout


def test_a_draft_changes_no_text(run, model_dir):
    settings = ("hello", "--max-tokens", 24, "--temperature", 0)
    plain = run("generate", model_dir, *settings)
    for draft in ("lookup", "int8", "layers"):
        assert run("generate", model_dir, *settings, "--draft", draft).stdout == plain.stdout
    refused = run("generate", model_dir, *settings, "--draft", "magic")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "lookup, int8, layers" in refused.stderr


def test_the_cache_is_kept_as_told(run, model_dir, monkeypatch):
    formats = []

    def kept(config, batch_size, max_len, dtype, device):
        formats.append(dtype)
        return KVCache(config, batch_size, max_len, dtype, device)

    monkeypatch.setattr("tinyllm.inference.generate.KVCache", kept)
    for option in ([], ["--cache", "int8"], ["--cache", "bf16"]):
        assert run("generate", model_dir, "hello", "--max-tokens", 3, *option).code == 0
    assert formats == [torch.float32, torch.int8, torch.bfloat16]
    refused = run("chat", model_dir, "--cache", "int4")
    assert (refused.code, refused.stderr) == (
        2,
        "error: --cache: 'int4' is not one of fp32, bf16, int8\n",
    )


def test_serve_refuses_settings_by_the_names_of_its_options(run, model_dir):
    refused = run("serve", model_dir, "--slots", 0, "--max-seconds", 0)
    assert refused.code == 2
    assert "--slots: must be at least 1, got 0" in refused.stderr
    assert "--max-seconds" in refused.stderr


def test_piped_questions_are_answered_in_turn(run, model_dir):
    options = ("--temperature", 0, "--max-tokens", 8)
    once = run("chat", model_dir, *options, stdin="hello\n")
    assert once.code == 0, once.stderr
    assert once.stderr == ""
    twice = run("chat", model_dir, *options, stdin="hello\n\n/reset\nhello\n/quit\nmore\n")
    assert twice.stdout == once.stdout * 2
    no_newline = run("chat", model_dir, *options, stdin="hello")
    assert no_newline.stdout == once.stdout


def test_bytes_that_are_no_text_are_survived_by_a_real_process(model_dir):
    done = subprocess.run(
        [*COMMAND, "chat", str(model_dir), "--max-tokens", "3"],
        input=b"\xff\xfe?\n",
        capture_output=True,
        timeout=PATIENCE_S,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "x"], "nowhere: no such folder"),
        (["generate", "{model}", "x " * 200], "prompt: has "),
        (["generate", "{model}", "x", "--top-p", "2"], "--top-p: must be above 0 and at most 1"),
        (["generate", "{model}", "x", "--max-tokens", "0"], "--max-tokens: must be at least 1"),
        (["generat"], "Did you mean 'generate'?"),
        (["chat"], "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, model_dir, arguments, message):
    done = run(*[argument.format(model=model_dir) for argument in arguments])
    assert done.code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_swapped_tokenizer_is_refused(run, tmp_path):
    directory = write_model_dir(tmp_path / "sft")
    (directory / "tokenizer.json").write_text("{}")
    done = run("chat", directory, stdin="hello\n")
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert "tokenizer.json: differs from its manifest" in line


def test_a_conversation_on_a_terminal(model_dir):
    terminal = Terminal("chat", model_dir, "--max-tokens", 8, "--temperature", 0)
    banner = terminal.wait_for(r"> ")
    assert "sft, 0.1 M parameters, context 96" in banner
    assert "/reset" in banner
    terminal.type("hello\r")
    first = terminal.wait_for(r"hello\r\n[^\n]+\r\n> ")
    terminal.type("/reset\r")
    terminal.wait_for(r"> ")
    terminal.type("hello\r")
    assert terminal.wait_for(r"hello\r\n[^\n]+\r\n> ") == first
    terminal.type("word " * 60 + "\r")  # a mistake does not end the conversation
    terminal.wait_for(r"error: question: takes \d+ tokens[^>]*> ")
    terminal.type("/nonsense\r")
    terminal.wait_for(r"no such command: /nonsense[^>]*> ")
    assert terminal.leave("\x04") == 0


def test_ctrl_c_stops_an_answer_and_then_leaves(tmp_path):
    model_dir = write_model_dir(tmp_path / "sft", max_seq_len=4096)
    terminal = Terminal("chat", model_dir, "--max-tokens", 4000, "--temperature", 0)
    terminal.wait_for(r"> ")
    terminal.type("hello\r")
    terminal.wait_for(r"hello\r\n.")
    terminal.type("\x03")
    assert len(terminal.wait_for(r"\n> ")) < 4000  # the whole answer: 15 000 characters, 12 s
    assert terminal.leave("\x03") == 0


def test_plan_tells_what_the_shipped_run_costs(run, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    done = run("plan", "--no-measure")
    assert done.code == 0, done.stderr
    for word in ("parameters", "FLOPs per token", "activations", "largest batch", "1040 of 2048"):
        assert word in done.stdout
    wrong = run("plan", "quantize")
    assert (wrong.code, len(wrong.stderr.splitlines())) == (2, 1)


def test_the_options_are_frozen():
    """A knob belongs into params.yaml, where DVC sees it; these are settings of one call."""
    sampling = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}
    sampling |= {"max_tokens", "model_dir", "cache"}
    serving = {"model_dir", "host", "port", "system", "slots", "queue", "chunk_tokens"}
    serving |= {"max_tokens", "max_seconds", "max_body_bytes", "grace_seconds", "cache"}
    options = {
        command.callback.__name__: set(command.callback.__annotations__) - {"return"}
        for command in app.registered_commands
    }
    assert options == {
        "generate": sampling | {"prompt", "draft"},
        "chat": sampling | {"system"},
        "serve": serving,
        "doctor": {"verify_cache"},
        "preset": {"name", "args"},
        "import_folder": {"folder", "model_dir"},
        "plan": {"section", "measure"},
        "prune_folder": {"folder", "corpus", "out", "vocab_size"},
        "verify": {"model_dir", "export_dir", "text", "json_file"},
    }


def test_an_exported_folder_is_imported_and_says_the_same(run, model_dir, tmp_path):
    write_hf(model_dir, tmp_path / "hf", "a card")
    done = run("import", tmp_path / "hf", tmp_path / "back")
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'back'}: imported\n")
    words = ["the", "--temperature", "0", "--max-tokens", "20"]
    assert run("generate", tmp_path / "back", *words) == run("generate", model_dir, *words)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    refused = run("import", tmp_path / "hf", tmp_path / "again")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "is a pickle" in refused.stderr


def test_verify_prints_the_table_and_refuses_another_models_export(run, model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(made_up_text(300, 5), encoding="utf-8")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        (tmp_path / "params.yaml").write_text(
            "export: {opset: 20, onnx_fp16: false, onnx_int8: false, onnx_static: null,"
            " static_chunk: 8, gguf: [], prompts: 1, prompt_tokens: 8,"
            " greedy_tokens: 4, max_logit_diff: 1.0e-4}\n"
        )
        numbers = tmp_path / "numbers.json"
        done = run("verify", model_dir, "--text", text, "--json", numbers)
        assert done.code == 0, done.stderr
        rows = json.loads(numbers.read_text())
        for name in ("ours", "ours_int8", "transformers", "onnx"):
            assert name in done.stdout
            assert rows[name]["tokens_per_s"] > 0
        assert max(map(len, done.stdout.splitlines())) <= 80
        with build_artifact(tmp_path / "export", kind="export", made_from=[model_dir]) as draft:
            (draft.path / "hf").mkdir()
        other = write_model_dir(tmp_path / "other", seed=4)
        refused = run("verify", other, "--export-dir", tmp_path / "export", "--text", text)
        assert (refused.code, len(refused.stderr.splitlines())) == (2, 1)
        assert "made from sft" in refused.stderr
        text.write_text(" ")
        refused = run("verify", model_dir, "--text", text)
        assert "is empty" in refused.stderr
