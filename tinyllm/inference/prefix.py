"""A shared start of prompts, such as a system message, with its keys and values computed once.

Kept as an artifact whose key is made of the model's, the tokenizer's and the prompt's digests: what
was made by another model, or was damaged, is never used but made again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from tinyllm.artifact import build_artifact, digest_json, load_manifest, verify_files
from tinyllm.errors import ArtifactError, DataError
from tinyllm.inference.generate import cache_dtype
from tinyllm.inference.scheduler import shared_start
from tinyllm.inference.slots import SlotCache
from tinyllm.inference.stored import Stored
from tinyllm.model.directory import TOKENIZER
from tinyllm.model.transformer import Transformer
from tinyllm.tokenizer.chat import ChatTemplate, Message
from tinyllm.tokenizer.tokenizer import Tokenizer

KIND, TENSORS, FORMAT = "prefix", "prefix.safetensors", 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """Tokens with their keys and values. L layers, G key-value heads, S tokens, K head width.

    Stored as the cache that they will be copied to.
    """

    ids: tuple[int, ...]
    keys: Stored
    """(L, G, S, K)."""
    values: Stored
    """(L, G, S, K)."""


def system_prefix(system: str, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens with which every conversation under a system message begins."""
    conversations = [[Message("system", system), Message("user", text)] for text in ("a", "b")]
    one, other = (template.encode(messages, tokenizer)[0] for messages in conversations)
    return one[: shared_start(one, other)]


@torch.inference_mode()
def compute_prefix(model: Transformer, ids: Sequence[int]) -> Prefix:
    """Return the tokens with their keys and values, from one pass over them."""
    device = model.rope_cos.device
    cache = SlotCache(model.config, 1, cache_dtype(model), device)
    model.hidden(torch.tensor([list(ids)], device=device), cache=cache.rows(0, [0]))
    keys_LGSK, values_LGSK = cache.fetch(0, len(ids))
    return Prefix(ids=tuple(ids), keys=keys_LGSK, values=values_LGSK)


def open_prefix(
    root: Path, model_dir: Path, model: Transformer, ids: Sequence[int]
) -> tuple[Prefix, str]:
    """Return a prefix from its artifact, or compute it and write the artifact.

    Args:
        root: the folder of all prefixes; each has a folder of its own, named after its key.
        model_dir: where the model comes from.
        model: the one loaded from there.
        ids: at least one token, fewer than the model's context.

    Returns:
        the prefix, and what was done: "loaded", or "computed" with the reason.

    Raises:
        DataError: the tokens do not leave room for a prompt.
    """
    if not 0 < len(ids) < model.config.max_seq_len:
        raise DataError(
            f"system message: takes {len(ids)} of {model.config.max_seq_len} tokens, so that no"
            " question fits behind it; shorten it"
        )
    key = prefix_key(model_dir, ids, cache_dtype(model))
    directory = root / key[:24]
    try:
        return load_prefix(directory, key), "loaded"
    except ArtifactError as error:
        reason = "first use" if not directory.exists() else str(error)
    prefix = compute_prefix(model, ids)
    save_prefix(prefix, directory, model_dir, key)
    return prefix, f"computed ({reason})"


def prefix_key(model_dir: Path, ids: Sequence[int], dtype: torch.dtype) -> str:
    """Return the digest of everything that the keys and values depend on."""
    manifest = load_manifest(model_dir)
    parts = {
        "format": FORMAT,
        "model": manifest.digest,
        "tokenizer": manifest.files[TOKENIZER],
        "prompt": digest_json(list(ids)),
        "dtype": str(dtype),
    }
    return digest_json(parts)


def save_prefix(prefix: Prefix, directory: Path, model_dir: Path, key: str) -> None:
    """Write the artifact, in place of one that was refused."""
    tensors = {"ids": torch.tensor(prefix.ids)}
    for name, stored in (("keys", prefix.keys), ("values", prefix.values)):
        for part, tensor in zip(("", "_scale"), stored.tensors, strict=False):
            tensors[name + part] = tensor.cpu().contiguous()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with build_artifact(directory, kind=KIND, made_from=[model_dir], config={"key": key}) as draft:
        safetensors.torch.save_file(tensors, draft.path / TENSORS)
        draft.info["n_tokens"] = len(prefix.ids)


def load_prefix(directory: Path, key: str) -> Prefix:
    """Read an artifact.

    Raises:
        ArtifactError: it is missing, damaged, or another model's, tokenizer's or prompt's.
    """
    manifest = load_manifest(directory, KIND)
    if manifest.config.get("key") != key:
        raise ArtifactError(
            f"{directory}: belongs to {str(manifest.config.get('key'))[:12]}, not to this model,"
            f" tokenizer and prompt, {key[:12]}; it is computed again"
        )
    verify_files(directory, manifest)
    try:
        tensors = safetensors.torch.load_file(directory / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{directory / TENSORS}: not readable: {error}") from None
    return Prefix(
        ids=tuple(tensors["ids"].tolist()),
        keys=Stored(tensors["keys"], tensors.get("keys_scale")),
        values=Stored(tensors["values"], tensors.get("values_scale")),
    )
