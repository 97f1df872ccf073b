"""A folder as chat_data, sft and lora find it, and what they leave: all of it tiny."""

import json
from pathlib import Path

from ruamel.yaml import YAML
from tiny_dirs import write_tokens
from tiny_lm import tiny_model
from tiny_text import tiny_tokenizer

from tinyllm import paths
from tinyllm.artifact import build_artifact
from tinyllm.model.directory import COPIED, save_model
from tinyllm.tokenizer.chat import CHAT_TEMPLATE

SOURCE = {"kind": "file", "sha256": None, "members": None, "encoding": "utf-8", "text_field": None}
TRAINING = {
    **{"steps": 6, "seq_len": 64, "batch_size": 2, "accumulate": 2, "optimizer": "adamw"},
    **{"lr": 3e-3, "muon_lr": 2e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95},
    **{"schedule": "cosine", "warmup_steps": 1, "decay_share": 0.5, "min_lr_share": 0.0},
    **{"clip_norm": 1.0, "precision": "fp32", "compile": "off", "checkpoint": "none"},
    **{"ema_decay": 0.0, "spike_factor": 0.0, "diagnostics": False, "preflight": True},
    **{"log_every": 2, "eval_every": 2, "sample_every": 3, "save_every": 1, "replay_rows": 1},
}
CHAT = {
    "sources": {
        "talk": {**SOURCE, "path": "talk.yml", "format": "yaml"},
        "mine": {**SOURCE, "path": "mine.jsonl", "format": "jsonl"},
    },
    **{"alternative_topics": [], "lora_topics": ["mine"], "val_share": 0.3, "max_tokens": 48},
}
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["q_proj", "down_proj"]}


def write_params(**sections) -> None:
    params = {"seed": 3, "chat": CHAT, "sft": TRAINING, "lora": {**TRAINING, **LORA, "lr": 1e-2}}
    for name, changes in sections.items():
        params[name] = {**params[name], **changes}
    with paths.PARAMS.open("w") as file:
        YAML(typ="safe").dump(params, file)


def write_dialogues(n: int = 24) -> None:
    yaml = {"conversations": [[f"the {i}?", f"it is {i}"] for i in range(n)]}
    with Path("talk.yml").open("w") as file:
        YAML(typ="safe").dump(yaml, file)
    lines = []
    for i in range(n):
        turns = [("user", f"my {i}?"), ("assistant", f"yours {i}")]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}) + "\n")
    Path("mine.jsonl").write_text("".join(lines))


def write_model(seed: int = 0) -> None:
    """A tokenizer and a pretrained model as the stages before would write them."""
    tokenizer = tiny_tokenizer(320, seed)
    with build_artifact(paths.TOKENIZER, kind="tokenizer", made_from=[]) as draft:
        (draft.path / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
        (draft.path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    copies = {name: paths.TOKENIZER / name for name in COPIED}
    with build_artifact(
        paths.PRETRAIN, kind="pretrain", made_from=[paths.TOKENIZER], copies=copies
    ) as draft:
        save_model(tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=96), draft.path)
    write_tokens()


def report(stage: str, name: str = "metrics.json"):
    text = (paths.REPORTS / stage / name).read_text()
    return json.loads(text)[stage] if name == "metrics.json" else json.loads(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
