"""A tiny model directory with a real tokenizer, for the export tests."""

from functools import cache

import torch
from tiny_lm import tiny_model
from tiny_text import made_up_text, tiny_tokenizer

from tinyllm.artifact import build_artifact
from tinyllm.corpus.documents import Document, write_documents
from tinyllm.model.directory import save_model
from tinyllm.tokenizer.chat import CHAT_TEMPLATE


def lively_model(vocab_size, **changes):
    """A model of which no weight has a neutral value, so that a lost one shows."""
    model = tiny_model(3, vocab_size=vocab_size, max_seq_len=64, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for block in model.layers:  # else a tied head repeats the last token for ever
            getattr(block.self_attn, "kv_b_proj" if model.config.mla else "v_proj").weight.mul_(4)
            block.mlp.down_proj.weight.mul_(4)
    return model


def write_clean(folder, seed=1):
    with build_artifact(folder, kind="clean", made_from=[]) as draft:
        for split in ("train", "val"):
            documents = [Document(f"{split}/a", made_up_text(300, seed))]
            write_documents(draft.path / split, documents)


@cache
def _tokenizer():
    return tiny_tokenizer(400)


def write_model(folder, clean, **changes):
    tokenizer = _tokenizer()
    with build_artifact(folder, kind="lora", made_from=[clean]) as draft:
        save_model(lively_model(tokenizer.vocab_size, **changes), draft.path)
        document = tokenizer.backend.to_str()
        (draft.path / "tokenizer.json").write_text(document, encoding="utf-8")
        (draft.path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        draft.info["val_bpb"] = 2.5
