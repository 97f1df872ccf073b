"""chat_data: params `chat`, data/tokenizer/pruned -> data/chat/{sft,lora}/{train,val}.jsonl."""

import shutil
from collections import Counter
from dataclasses import dataclass
from typing import Any

from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import build_artifact, digest_json
from tinyllm.corpus.extract import read_members
from tinyllm.corpus.fetch import fetch
from tinyllm.finetune.conversations import Conversation, conversations_path, write_conversations
from tinyllm.finetune.division import ChatParams, divide
from tinyllm.finetune.examples import count, encode_conversations
from tinyllm.finetune.reading import drop_duplicates, read_conversations
from tinyllm.params import load_params, to_plain
from tinyllm.report import write_metrics
from tinyllm.tokenizer.chat import ChatTemplate
from tinyllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The sections this stage reads."""

    chat: ChatParams


def chat_data() -> None:
    """Fetch dialogues, clean them and divide them between SFT and LoRA, training and validation."""
    chat = load_params(Params, paths.PARAMS).chat
    progress, dropped = console_progress(), Counter[str]()
    found: list[Conversation] = []
    tokenizer, template = Tokenizer.load(paths.TOKENIZER), ChatTemplate.load(paths.TOKENIZER)
    fetched = paths.inflight_root() / "chat_data"  # a broken download goes on
    for name, source in sorted(chat.sources.items()):
        files = fetch(source, fetched / digest_json(to_plain(source))[:16], progress)
        members = read_members(source, files)
        found += read_conversations(name, source, members, chat.alternative_topics, dropped)
    divided = divide(list(drop_duplicates(found, dropped)), chat)
    metrics: dict[str, Any] = {}
    made_from = [paths.TOKENIZER]
    with build_artifact(paths.CHAT, kind="chat", made_from=made_from, config=chat) as draft:
        for (part, split), conversations in divided.items():
            write_conversations(conversations_path(draft.path, part, split), conversations)
            examples = encode_conversations(conversations, template, tokenizer, chat.max_tokens)
            dropped["question_too_long"] += len(conversations) - len(examples)
            metrics.setdefault(part, {})[split] = count(conversations, examples)
            progress.say(f"{part} {split}: {len(conversations)} conversations")
        metrics["dropped"] = dict(dropped)
        draft.info.update(metrics)
    shutil.rmtree(fetched, ignore_errors=True)
    write_metrics(paths.REPORTS, "chat_data", metrics)


if __name__ == "__main__":
    run_stage(chat_data)
