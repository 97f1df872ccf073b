"""The `export` section of params.yaml."""

from dataclasses import dataclass
from typing import Literal

GgufType = Literal["f32", "f16", "q8_0"]
"""How a GGUF file stores matrices: exactly, in half precision, in 8 bits with a scale per 32."""

OPSETS = range(18, 24)
"""Operator sets that the exporter writes and ONNX Runtime runs; 18 and 20 are the most portable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportParams:
    """What is written, how it is proven, and when the proof fails."""

    opset: int
    """Version of ONNX's operator set, 18 to 23."""
    onnx_fp16: bool
    """Also write `model_fp16.onnx`: weights, cache and arithmetic in 16 bits."""
    onnx_int8: bool
    """Also write 8-bit weights: `model_int8.onnx`, for ONNX Runtime only, and `model_qdq.onnx`."""
    onnx_static: Literal["host", "graph"] | None
    """Also write `static/`, without a free dimension; its cache is written by the host, who calls
    it, or in the graph. null: neither."""
    static_chunk: int
    """Tokens that the static prefill graph reads at once; at most the context."""
    gguf: tuple[GgufType, ...]
    """Files for llama.cpp, one per type; none where it has no such architecture."""
    prompts: int
    """Held-out passages to compare on; one conversation is added."""
    prompt_tokens: int
    """Tokens of each; at most half of the model's context."""
    greedy_tokens: int
    """Tokens that each runtime continues them with; at most what the context leaves."""
    max_logit_diff: float
    """Largest difference to our own fp32 logits that transformers and ONNX may show."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        problems = []
        if self.opset not in OPSETS:
            problems.append(f"opset: {self.opset} is not from {OPSETS[0]} to {OPSETS[-1]}; take 20")
        problems += [
            f"{name}: must be at least 1, got {getattr(self, name)}"
            for name in ("static_chunk", "prompts", "prompt_tokens", "greedy_tokens")
            if getattr(self, name) < 1
        ]
        if not 0 < self.max_logit_diff < 1:
            problems.append(f"max_logit_diff: must be between 0 and 1, got {self.max_logit_diff}")
        if problems:
            raise ValueError("\n".join(problems))
