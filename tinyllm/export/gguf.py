"""A model directory as one GGUF file, which llama.cpp and everything built on it read.

    "GGUF", version, counts | metadata: key, type, value | tensors: name, shape, type, offset | data

Little-endian, every tensor at a multiple of 32 bytes. The metadata hold the sizes, the tokenizer,
the chat template, and the digests of everything the model was made from. Which tensors and under
which names is the business of `gguf_layout.py`; the bytes are written by the `gguf` package.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, LlamaFileType, TokenType

from tinyllm.artifact import Manifest, load_manifest
from tinyllm.errors import ArtifactError, DataError, LineageError
from tinyllm.export.gguf_layout import architecture_of, gguf_sizes, gguf_tensors
from tinyllm.export.params import GgufType
from tinyllm.model.directory import load_config, load_weights
from tinyllm.model.sizes import ModelConfig
from tinyllm.tokenizer.chat import ChatTemplate
from tinyllm.tokenizer.special import END_OF_TEXT, END_OF_TURN, PAD, SPECIAL_TOKENS
from tinyllm.tokenizer.split import PATTERN
from tinyllm.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer

_FILE_TYPES: dict[GgufType, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
Q8_0_BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""
_PRE_TOKENIZER = "dbrx"
"""llama.cpp's name of `PATTERN`; a wrong one is taken without a word and cuts other tokens."""
_SOURCE = "tinyllm.digest"


def write_gguf(source: Path, path: Path, kind: GgufType) -> None:
    """Write the file of a float model directory.

    The same directory gives the same bytes. An older file is replaced when the new one is whole.

    Args:
        source: a `float` model directory; its files are checked against its manifest.
        path: of the file; its folder must be there.
        kind: how matrices are stored. Vectors stay F32; with q8_0, rows that are no multiple of 32
        are F16.

    Raises:
        ArtifactError: the source is damaged, or holds no float weights.
        DataError: llama.cpp has no such architecture or tokenizer; the message says what would do.
    """
    config, weight_format = load_config(source)
    architecture = architecture_of(config)
    if weight_format != "float":
        raise ArtifactError(f"{source}: holds {weight_format} weights, GGUF needs the float model")
    tensors = gguf_tensors(load_weights(source), config)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, architecture)
    sizes = {f"{architecture}.{name}": value for name, value in gguf_sizes(config).items()}
    for part in (
        _general(kind),
        sizes,
        _tokenizer(source, config),
        _lineage(load_manifest(source)),
    ):
        _add(writer, part)
    try:
        for name, w in tensors.items():
            data, stored = _stored(w.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def read_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file; its weights stay on disk until they are touched.

    Raises:
        ArtifactError: missing, no GGUF file, or shorter than its own table says.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; build it with `dvc repro export`")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{path}: truncated or no GGUF file ({reason}); write or download it again"
        ) from None


def check_gguf(path: Path, source: Path) -> None:
    """Refuse a file that cannot be read whole, or was made from another model than the given one.

    Raises:
        ArtifactError: damaged.
        LineageError: made from another model directory, or not by us.
    """
    field, digest = read_gguf(path).get_field(_SOURCE), load_manifest(source).digest
    made_from = "nothing of ours" if field is None else str(field.contents())
    if made_from != digest:
        raise LineageError(
            f"{path} and {source} do not belong together: made from {made_from[:15]}, not"
            f" {digest[:12]}; rebuild it with `dvc repro export`"
        )


def _general(kind: GgufType) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.name": "tinyllm",
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _tokenizer(source: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the tokenizer and the chat template as llama.cpp's metadata.

    Raises:
        ArtifactError: a file is missing, or the tokenizer is not that of the model.
        DataError: llama.cpp would cut text otherwise.
    """
    tokenizer, template = Tokenizer.load(source), ChatTemplate.load(source)
    if tokenizer.vocab_size != config.vocab_size:
        raise ArtifactError(
            f"{source / TOKENIZER_FILE}: has {tokenizer.vocab_size} tokens, the model"
            f" {config.vocab_size}"
        )
    document = json.loads((source / TOKENIZER_FILE).read_text(encoding="utf-8"))
    if not _cuts_as_dbrx(document):
        raise DataError(
            f"GGUF: {source / TOKENIZER_FILE} cuts text by rules that llama.cpp has no name for;"
            " a tokenizer of `dvc repro prune_vocab` would work"
        )
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    n_special = len(SPECIAL_TOKENS)
    kinds = [TokenType.CONTROL] * n_special + [TokenType.NORMAL] * (len(vocabulary) - n_special)
    return {
        "tokenizer.ggml.model": "gpt2",  # byte-level BPE
        "tokenizer.ggml.pre": _PRE_TOKENIZER,
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": [int(token_kind) for token_kind in kinds],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "tokenizer.ggml.eos_token_id": SPECIAL_TOKENS.index(END_OF_TURN),
        "tokenizer.ggml.padding_token_id": SPECIAL_TOKENS.index(PAD),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": template.source,
    }


def _cuts_as_dbrx(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json has our split, nothing before it, and merges everything it can."""
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    parts = (document.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return (
        document.get("normalizer") is None
        and [part.get("type") for part in parts] == ["Split", "ByteLevel"]
        and {name: parts[0].get(name) for name in split} == split
        and not parts[0].get("invert")
        and not parts[1].get("add_prefix_space")
        and not document["model"].get("ignore_merges")
    )


def _lineage(manifest: Manifest) -> dict[str, Any]:
    """Return the digests of the model and of everything it was made from."""
    ancestors = {f"tinyllm.lineage.{kind}": d for kind, d in sorted(manifest.lineage.items())}
    return {_SOURCE: manifest.digest, "tinyllm.kind": manifest.kind, **ancestors}


def _add(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Add values with the types that llama.cpp insists on: whole numbers are uint32, not int."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _stored(w: npt.NDArray[np.float32], kind: GgufType) -> tuple[npt.NDArray[Any], Any]:
    """Return one tensor as it is stored, and its type."""
    if kind == "f32" or w.ndim == 1:
        stored = GGMLQuantizationType.F32
    elif kind == "q8_0" and w.shape[-1] % Q8_0_BLOCK == 0:
        stored = GGMLQuantizationType.Q8_0
    else:
        stored = GGMLQuantizationType.F16
    return gguf.quants.quantize(np.ascontiguousarray(w), stored), stored
