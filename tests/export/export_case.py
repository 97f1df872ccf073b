"""A tiny model directory with a real tokenizer, for the export tests."""

import copy
from functools import cache

import torch
from tiny_lm import tiny_model
from tiny_text import made_up_text, tiny_tokenizer

from tinyllm.artifact import build_artifact
from tinyllm.corpus.documents import Document, write_documents
from tinyllm.finetune.adapter import save_adapter
from tinyllm.finetune.lora import add_lora, lora_layers, merge_lora
from tinyllm.model.directory import save_model
from tinyllm.tokenizer.chat import CHAT_TEMPLATE


class Lora:
    rank, alpha, dropout = 3, 6.0, 0.0

    def __init__(self, targets):
        self.targets = targets


def lively_model(vocab_size, **changes):
    """A model of which no weight has a neutral value, so that a lost one shows."""
    model = tiny_model(3, vocab_size=vocab_size, **{"max_seq_len": 64, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for block in model.layers:  # else a tied head repeats the last token for ever
            getattr(block.self_attn, "kv_b_proj" if model.config.mla else "v_proj").weight.mul_(4)
            block.mlp.down_proj.weight.mul_(4)
    return model


def with_large_activations(model, largest):
    """The same function with a residual stream so much larger: what is added to it grows alike."""
    ids, seen = torch.arange(40)[None] % model.config.vocab_size, []
    hook = model.norm.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].abs().max())
    )
    with torch.no_grad():
        model(ids)
        hook.remove()
        large = copy.deepcopy(model)
        large.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        large.embed_tokens.weight.mul_(largest / seen[0])
        for block in large.layers:
            block.self_attn.o_proj.weight.mul_(largest / seen[0])
            block.mlp.down_proj.weight.mul_(largest / seen[0])
    return large


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
    _write(folder, "lora", [clean], tokenizer, lively_model(tokenizer.vocab_size, **changes))


def write_adapted(folder, clean, targets=None, **changes):
    """Write sft, an adapter of it with no neutral value, and both merged: lora."""
    tokenizer = _tokenizer()
    model = lively_model(tokenizer.vocab_size, **changes)
    _write(folder / "sft", "sft", [clean], tokenizer, model)
    add_lora(model, Lora(targets), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1, generator=generator)
    with build_artifact(folder / "adapter", kind="adapter", made_from=[folder / "sft"]) as draft:
        save_adapter(model, draft.path)
    merge_lora(model)
    sources = [folder / "sft", folder / "adapter"]
    _write(folder / "merged", "lora", sources, tokenizer, model)


def _write(folder, kind, sources, tokenizer, model):
    with build_artifact(folder, kind=kind, made_from=sources) as draft:
        save_model(model, draft.path)
        document = tokenizer.backend.to_str()
        (draft.path / "tokenizer.json").write_text(document, encoding="utf-8")
        (draft.path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        draft.info["val_bpb"] = 2.5
