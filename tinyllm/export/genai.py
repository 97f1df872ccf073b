"""The ONNX folder for ONNX Runtime GenAI: one more file, and the runtime to prove it.

`onnxruntime_genai.Model(folder)` reads genai_config.json, tokenizer.json, tokenizer_config.json,
the chat template and the graph that the config names. It fills `past_key_values.N.*` itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.errors import ArtifactError
from tinyllm.model.sizes import ModelConfig
from tinyllm.tokenizer.special import END_OF_TEXT, END_OF_TURN, PAD, SPECIAL_TOKENS

GENAI_CONFIG = "genai_config.json"


def genai_refuses(config: ModelConfig) -> str | None:
    """Return why GenAI cannot run an architecture, or None."""
    _, d_k, d_v = config.cached
    if d_k != d_v:
        return (
            f"ONNX Runtime GenAI keeps keys and values of one width, latent attention caches {d_k}"
            f" and {d_v}; model.attention: gqa works, and so does model.onnx in ONNX Runtime"
        )
    return None


def genai_config(config: ModelConfig, graph: str) -> dict[str, Any]:
    """Return the content of genai_config.json.

    Args:
        config: the sizes.
        graph: the file of a dynamic ONNX graph in the same folder.
    """
    n_kv_heads, width, _ = config.cached
    ids = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    return {
        "model": {
            "type": "llama",  # any decoder whose graph has these inputs; the layers are its own
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": [ids[END_OF_TURN], ids[END_OF_TEXT]],
            "pad_token_id": ids[PAD],
            "vocab_size": config.vocab_size,
            "context_length": config.max_seq_len,
            "decoder": {
                "filename": graph,
                "head_size": width,
                "hidden_size": config.d,
                "num_attention_heads": config.n_heads,
                "num_key_value_heads": n_kv_heads,
                "num_hidden_layers": config.n_layers,
                "session_options": {"log_id": "tinyllm", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_seq_len,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,  # true would need its own attention operator
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


class GenaiModel:
    """A folder in ONNX Runtime GenAI, on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Load the folder as it is.

        Raises:
            ArtifactError: GenAI cannot read it.
        """
        import onnxruntime_genai as og

        self._og = og
        try:
            self._model = og.Model(str(folder))
            self._tokenizer = og.Tokenizer(self._model)
        except Exception as error:  # the library's own exceptions have no common base
            reason = " ".join(str(error).split())
            raise ArtifactError(f"{folder}: GenAI cannot load it: {reason}") from None

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of every position of one sequence, (T, V), in one pass."""
        logits_TV: npt.NDArray[np.float32] = self._begin(ids).get_output("logits")[0]
        return logits_TV

    def greedy(
        self, prompt_ids: Sequence[int], n_tokens: int
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Return GenAI's own greedy tokens and the logits each was taken from, (n_tokens, V).

        It stops at an end of turn, and this comparison does not: all so far is then read again.
        """
        generator, answer, steps = self._begin(prompt_ids), [], []
        for _ in range(n_tokens):
            steps.append(generator.get_logits()[0, -1].copy())
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
            if generator.is_done() and len(answer) < n_tokens:
                generator = self._begin([*prompt_ids, *answer])
        return answer, np.stack(steps)

    def encode(self, text: str) -> list[int]:
        """Return GenAI's ids of a text; special tokens in it are read as such."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def _begin(self, ids: Sequence[int]) -> Any:
        """Return a generator that has read a prompt."""
        generator = self._og.Generator(self._model, self._og.GeneratorParams(self._model))
        generator.append_tokens(np.array(ids, np.int32))
        return generator
