"""A byte-level tokenizer, so that expected ids can be written by hand, and sections to change."""

from tinyllm.finetune.conversations import Conversation
from tinyllm.finetune.lora import LoraParams
from tinyllm.tokenizer.alphabet import BYTE_ORDER
from tinyllm.tokenizer.chat import ChatTemplate, Message
from tinyllm.tokenizer.special import SPECIAL_TOKENS
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.tokenizer.train import TokenizerParams, train_bpe

TEMPLATE = ChatTemplate()
USER, ASSISTANT, END, PAD = 2, 3, 4, 5
X = -100

TRAINING = {
    "steps": 4,
    "seq_len": 64,
    "batch_size": 2,
    "accumulate": 1,
    "optimizer": "adamw",
    "lr": 1e-2,
    "muon_lr": 1e-2,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "schedule": "cosine",
    "warmup_steps": 0,
    "decay_share": 0.0,
    "min_lr_share": 0.0,
    "clip_norm": 1.0,
    "precision": "fp32",
    "compile": "off",
    "checkpoint": "none",
    "ema_decay": 0.0,
    "spike_factor": 0.0,
    "diagnostics": False,
    "preflight": False,
    "log_every": 1,
    "eval_every": 2,
    "sample_every": 0,
    "save_every": 0,
}
LORA = {
    "replay_rows": 0,
    "rank": 3,
    "alpha": 6.0,
    "dropout": 0.0,
    "targets": ("q_proj", "v_proj", "down_proj"),
}


def byte_tokenizer() -> Tokenizer:
    n_tokens = len(SPECIAL_TOKENS) + 256
    params = TokenizerParams(vocab_size=n_tokens, min_count=1, sample_bytes=10**6)
    return Tokenizer(train_bpe(["no room for merges"], params))


def byte_id(character: str) -> int:
    (byte,) = character.encode()
    return len(SPECIAL_TOKENS) + BYTE_ORDER.index(byte)


def text_ids(text: str) -> list[int]:
    return [byte_id(character) for character in text]


def talk(*turns: str, name: str = "s/t/000000") -> Conversation:
    roles = ("user", "assistant")
    return Conversation(name, tuple(Message(roles[i % 2], t) for i, t in enumerate(turns)))


def lora_params(**changes) -> LoraParams:
    return LoraParams(**{**TRAINING, **LORA, **changes})
