"""Model directories as the pipeline makes them, tiny, for tests."""

from pathlib import Path

import torch
from tiny_lm import tiny_config
from tiny_text import made_up_text

from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest
from tinyllm.model.directory import CHAT_TEMPLATE as CHAT_TEMPLATE_FILE
from tinyllm.model.directory import TOKENIZER, save_model
from tinyllm.model.init import build_model
from tinyllm.progress import Silent
from tinyllm.quantization.directory import save_quantized_model
from tinyllm.quantization.int8 import quantize_model
from tinyllm.shards.writer import EncodeParams, write_split
from tinyllm.tokenizer.chat import CHAT_TEMPLATE
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.tokenizer.train import TokenizerParams, train_bpe

VOCAB_SIZE = 400


def tokenizer_document(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> str:
    params = TokenizerParams(vocab_size=vocab_size, min_count=2, sample_bytes=10**9)
    return train_bpe([made_up_text(2000, seed)], params)


def write_model_dir(
    directory: Path, kind: str = "sft", *, seed: int = 0, vocab_size: int = VOCAB_SIZE, **sizes
) -> Path:
    """Write a random model with its tokenizer; kind int8 is quantised."""
    config = tiny_config(vocab_size=vocab_size, d=64, n_heads=2, n_kv_heads=1, d_head=32, **sizes)
    model = build_model(config, seed).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    with build_artifact(directory, kind=kind, made_from=[]) as draft:
        (draft.path / TOKENIZER).write_text(tokenizer_document(), encoding="utf-8")
        (draft.path / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
        if kind == "int8":
            save_quantized_model(quantize_model(model), draft.path)
        else:
            save_model(model, draft.path)
    return directory


def write_tokens(n_words: int = 600) -> None:
    """Write data/tokens with the tokenizer of data/tokenizer/pruned."""
    tokenizer, digest = Tokenizer.load(paths.TOKENIZER), load_manifest(paths.TOKENIZER).digest
    texts = {"train": made_up_text(n_words, 1), "val": made_up_text(n_words // 2, 2)}
    size = EncodeParams(shard_bytes=10**6)
    with build_artifact(paths.TOKENS, kind="tokens", made_from=[paths.TOKENIZER]) as draft:
        splits = {
            split: write_split(
                [("a text", text)], draft.path, split, tokenizer, digest, size, Silent()
            )
            for split, text in texts.items()
        }
        vocab_size = tokenizer.vocab_size
        draft.info.update(splits=splits, vocab_size=vocab_size, tokenizer=digest, dtype="uint16")
