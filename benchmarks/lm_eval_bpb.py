"""Bits per byte of an exported folder in lm-evaluation-harness, against ours, offline.

    pip install -c constraints.txt -e '.[eval]'
    python benchmarks/lm_eval_bpb.py MODEL_DIR HF_FOLDER TEXT_FILE

The harness scores a local task (loglikelihood_rolling, one document per passage) with the folder in
transformers. Its first prediction of a document is made after the prefix token, our <|endoftext|>;
we do the same. Passages fit into one window, because its last window of a longer document sees more
context than ours. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyllm.evaluation.loss import LossReport, TokenPart, evaluate_stream
from tinyllm.model.directory import load_model
from tinyllm.shards.stream import TokenStream
from tinyllm.tokenizer.tokenizer import Tokenizer

TASK = """task: tinyllm_bpb
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
metadata: {{version: 1.0}}
"""


def passages(tokenizer: Tokenizer, text: str, n_tokens: int, n_passages: int) -> list[str]:
    """Return passages of a text, each shorter than `n_tokens`, cut where no character is."""
    ids = tokenizer.encode(text)
    cut = [ids[i : i + n_tokens - 8] for i in range(0, len(ids), n_tokens - 8)][:n_passages]
    texts = [tokenizer.decode(part).strip("\ufffd") for part in cut]
    return [text for text in texts if text.strip()]


def our_bits_per_byte(model_dir: Path, texts: Sequence[str]) -> float:
    """Return our bits per byte, each passage after <|endoftext|>."""
    model, tokenizer = load_model(model_dir), Tokenizer.load(model_dir)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    for text in texts:
        ids = np.array([tokenizer.end_of_text, *tokenizer.encode(text)], np.uint32)
        part = TokenPart(stream=TokenStream([ids]), n_bytes=len(text.encode()))
        loss = evaluate_stream(
            model,
            part,
            seq_len=model.config.max_seq_len,
            batch_tokens=model.config.max_seq_len,
            precision="fp32",
        )
        nats += loss.val_loss * loss.n_tokens
        n_tokens, n_bytes = n_tokens + loss.n_tokens, n_bytes + loss.n_bytes
    return LossReport.from_nats(nats, n_tokens, n_bytes).val_bpb


def harness_bits_per_byte(hf_folder: Path, texts: Sequence[str]) -> float:
    """Return the harness's bits per byte of the same passages; nothing is looked up anywhere."""
    with tempfile.TemporaryDirectory() as work:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ[name] = "1"
        os.environ["HF_HOME"] = work  # datasets keeps a copy of what it reads
        import lm_eval
        from lm_eval.tasks import TaskManager

        file = Path(work) / "passages.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (Path(work) / "task.yaml").write_text(TASK.format(file=file))
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(hf_folder), "dtype": "float32"},
            tasks=["tinyllm_bpb"],
            task_manager=TaskManager(include_path=work, include_defaults=False),
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
        )
    value: float = found["results"]["tinyllm_bpb"]["bits_per_byte,none"]
    return value


def compare(model_dir: Path, hf_folder: Path, text: str, n_passages: int) -> dict[str, float]:
    """Return both figures and their difference."""
    model, tokenizer = load_model(model_dir), Tokenizer.load(model_dir)
    texts = passages(tokenizer, text, model.config.max_seq_len, n_passages)
    ours, theirs = our_bits_per_byte(model_dir, texts), harness_bits_per_byte(hf_folder, texts)
    figures = {"passages": len(texts), "ours_bpb": ours, "lm_eval_bpb": theirs}
    return {**figures, "difference_bpb": abs(ours - theirs)}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("hf_folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--passages", type=int, default=64)
    asked = parser.parse_args()
    text = asked.text.read_text(encoding="utf-8")
    figures = compare(asked.model_dir, asked.hf_folder, text, asked.passages)
    print(f"bits per byte: ours {figures['ours_bpb']:.6f}, lm-eval {figures['lm_eval_bpb']:.6f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
