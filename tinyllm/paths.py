"""Where everything lies, relative to the folder of dvc.yaml; a test compares the two."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
PRESETS = Path("presets")

RAW = Path("data/raw")
CLEAN = Path("data/clean")
TOKENIZER_FULL = Path("data/tokenizer/full")
TOKENIZER = Path("data/tokenizer/pruned")
TOKENS = Path("data/tokens")
PRETRAIN = Path("data/models/pretrain")
CHAT = Path("data/chat")
SFT = Path("data/models/sft")
LORA = Path("data/models/lora")
LORA_ADAPTER = LORA / "adapter"
LORA_MERGED = LORA / "merged"
INT8 = Path("data/models/int8")
EXPORT = Path("data/export")

REPORTS = Path("reports")
REPORT_PAGE = REPORTS / "index.html"


def inflight_root() -> Path:
    """Return the folder of unfinished training runs.

    `TINYLLM_INFLIGHT` if set; else `.inflight` beside the repository that started DVC (`DVC_ROOT`
    is that one also in temporary and queued experiments, so they share it); else `.inflight` here.
    """
    given = os.environ.get("TINYLLM_INFLIGHT")
    return Path(given) if given else Path(os.environ.get("DVC_ROOT", ".")) / ".inflight"
