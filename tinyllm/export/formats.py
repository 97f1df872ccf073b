"""What an export can hold, and what runs each of it: the rows of the parity table.

A new format is one entry of `FORMATS` and the lines of `bundle.py` that write its file. Nothing
here imports a runtime's package: that happens when a format is opened.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tinyllm.export.families import hf_refuses
from tinyllm.export.genai import GenaiModel, genai_refuses
from tinyllm.export.gguf_layout import gguf_refusal
from tinyllm.export.hf_runtime import PeftAdapter, TransformersModel
from tinyllm.export.llamacpp_runtime import LlamaCppModel
from tinyllm.export.params import GgufType
from tinyllm.export.runtime import OnnxModel
from tinyllm.export.static_runtime import StaticModel, open_rounded
from tinyllm.export.verify import Runtime
from tinyllm.model.sizes import ModelConfig

HF, PEFT, ONNX = "hf", "peft", "onnx"
ONNX_FLOAT, ONNX_FP16 = f"{ONNX}/model.onnx", f"{ONNX}/model_fp16.onnx"
ONNX_INT8, ONNX_QDQ = f"{ONNX}/model_int8.onnx", f"{ONNX}/model_qdq.onnx"
ONNX_STATIC = f"{ONNX}/static"
GGUF: dict[GgufType, str] = {
    "f32": "gguf/model_f32.gguf",
    "f16": "gguf/model_f16.gguf",
    "q8_0": "gguf/model_q8_0.gguf",
}


def _takes_all(config: ModelConfig) -> str | None:
    """Refuse nothing."""
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One row of the parity table."""

    name: str
    """Of the row and of its metrics."""
    file: str
    """A file or folder of the export, relative to it; where it is absent, there is no row."""
    module: str
    """The Python module that runs it; where it is not installed, the row says so."""
    open: Callable[[Path], Runtime]
    """Opens the file. A runtime that also has `encode` (`TextRuntime`) has its ids compared."""
    exact: bool
    """It computes in fp32 with our weights: the stage fails where it differs from ours."""
    refuses: Callable[[ModelConfig], str | None] = _takes_all
    """Why the format cannot hold an architecture, and what would work; None: it can."""

    def is_installed(self) -> bool:
        """Return whether its runtime is."""
        return find_spec(self.module) is not None


def _onnx(path: Path) -> Runtime:
    return OnnxModel(path, n_threads=1)


def _static(path: Path) -> Runtime:
    return StaticModel(path, n_threads=1)


def _static_fp16(path: Path) -> Runtime:
    return open_rounded(path, n_threads=1)


def _gguf(path: Path) -> Runtime:
    return LlamaCppModel(path, n_threads=1)


def _genai(path: Path) -> Runtime:
    return GenaiModel(path.parent)  # the folder as it is; the row counts the graph it runs


FORMATS = (
    Format(
        name="transformers",
        file=HF,
        module="transformers",
        open=TransformersModel,
        exact=True,
        refuses=hf_refuses,
    ),
    Format(name="peft", file=PEFT, module="peft", open=PeftAdapter, exact=True),
    Format(name="onnx", file=ONNX_FLOAT, module="onnxruntime", open=_onnx, exact=True),
    Format(name="onnx_static", file=ONNX_STATIC, module="onnxruntime", open=_static, exact=True),
    Format(
        name="onnx_static_fp16",
        file=ONNX_STATIC,
        module="onnxruntime",
        open=_static_fp16,
        exact=False,
    ),
    Format(name="onnx_fp16", file=ONNX_FP16, module="onnxruntime", open=_onnx, exact=False),
    Format(name="onnx_int8", file=ONNX_INT8, module="onnxruntime", open=_onnx, exact=False),
    Format(name="onnx_qdq", file=ONNX_QDQ, module="onnxruntime", open=_onnx, exact=False),
    Format(
        name="onnx_genai",
        file=ONNX_FLOAT,
        module="onnxruntime_genai",
        open=_genai,
        exact=True,
        refuses=genai_refuses,
    ),
    *(
        Format(
            name=f"gguf_{kind}",
            file=file,
            module="llama_cpp",
            open=_gguf,
            exact=kind == "f32",
            refuses=gguf_refusal,
        )
        for kind, file in GGUF.items()
    ),
)
"""In the order of the table."""
