"""What SFT and LoRA share: examples of one part of the chat data, their loss, sampled answers.

The loop itself is `tinyllm.training`; this is what it is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllm.artifact import load_manifest, verify_files
from tinyllm.errors import DataError
from tinyllm.finetune.conversations import (
    Conversation,
    Part,
    Split,
    conversations_path,
    load_conversations,
)
from tinyllm.finetune.examples import ChatBatches, Example, build_batch, encode_conversations, pack
from tinyllm.finetune.replay import ChatTrainingParams, ReplayBatches
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.directory import load_config
from tinyllm.model.transformer import Transformer, next_token_loss
from tinyllm.shards.batches import Batches, StreamBatches
from tinyllm.shards.reader import TokenShards
from tinyllm.tokenizer.chat import ChatTemplate, Message
from tinyllm.tokenizer.special import END_OF_TURN, PAD
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.training.precision import autocast
from tinyllm.training.run import TrainResult

N_SAMPLES = 6
"""Held-out questions that are answered before and after training."""
SAMPLE_TOKENS = 64
"""Longest sampled answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model says to a held-out question."""

    question: str
    answer: str
    ended: bool
    """The model ended its turn itself, within `SAMPLE_TOKENS`."""


class ChatTask:
    """One part of data/chat, encoded for one model."""

    def __init__(
        self,
        chat: Path,
        part: Part,
        model_directory: Path,
        tokens: Path,
        params: ChatTrainingParams,
    ) -> None:
        """Read and encode.

        Args:
            chat: the artifact of `chat_data`.
            part: whose conversations.
            model_directory: gives tokenizer, chat template and the longest sequence.
            tokens: the artifact of `encode`, whose text is replayed.
            params: give seq_len, batch_size, replay_rows and precision.

        Raises:
            TinyllmError: files are missing or damaged, a split is empty, rows are too long or too
                short.
        """
        manifest = load_manifest(chat, "chat")
        verify_files(chat, manifest)
        self.part, self.params, self._tokens = part, params, tokens
        self.max_tokens = int(manifest.config["max_tokens"])
        self.tokenizer = Tokenizer.load(model_directory)
        self.template = ChatTemplate.load(model_directory)
        self._held_out, self._val_examples = self._load(chat, "val")
        _, self._train_examples = self._load(chat, "train")
        longest = load_config(model_directory)[0].max_seq_len
        if params.seq_len > longest:
            raise DataError(
                f"{part}.seq_len: {params.seq_len} is more than the {longest} tokens of"
                f" {model_directory}; lower it or pretrain with a larger model.max_seq_len"
            )
        if params.seq_len < self.max_tokens - 1:
            raise DataError(
                f"{part}.seq_len: {params.seq_len} is too short for conversations of"
                f" chat.max_tokens = {self.max_tokens}; raise it or lower chat.max_tokens"
            )

    def batches(self, seed: int) -> Batches:
        """Return the training batches: dialogues, and `replay_rows` rows of text below them."""
        pad_id, params = self.tokenizer.id_of(PAD), self.params
        n_rows = params.batch_size - params.replay_rows
        chat = ChatBatches(self._train_examples, params.seq_len, n_rows, seed, pad_id)
        if not params.replay_rows:
            return chat
        text = TokenShards.open(self._tokens, "train", tokenizer_digest=None).stream
        return ReplayBatches(chat, StreamBatches(text, params.seq_len, params.replay_rows, seed))

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Return the loss on the held-out answers.

        `val_loss` is in nats per learned token, `val_bpb` in bits per UTF-8 byte of the answers;
        the ends of turns cost bits and have no bytes.
        """
        rows = pack(self._val_examples, range(len(self._val_examples)), self.params.seq_len)
        nats = 0.0
        for start in range(0, len(rows), self.params.batch_size):
            nats += self._nats(model, rows[start : start + self.params.batch_size])
        answers = [example.answer_ids.tolist() for example in self._val_examples]
        n_bytes = sum(self.tokenizer.n_bytes(ids) for ids in answers)
        return {
            "val_loss": nats / sum(map(len, answers)),
            "val_bpb": nats / math.log(2) / n_bytes,
        }

    def figures(self, model: Transformer, result: TrainResult) -> dict[str, float]:
        """Return the metrics of a finished run: the loss before and after, ended answers."""
        before, after = result.curve[0], self.evaluate(model)
        answers = self.answers(model)
        return {
            **after,
            "val_loss_before": before["val_loss"],
            "val_bpb_before": before["val_bpb"],
            "ended_share": sum(answer.ended for answer in answers) / max(1, len(answers)),
        }

    def answers(self, model: Transformer) -> list[Answer]:
        """Return the likeliest answers to a few held-out questions, spread over the split."""
        longest = model.config.max_seq_len - 1
        asked = dict.fromkeys(conversation.question for conversation in self._held_out)
        prompts = {question: self._prompt(question) for question in asked}
        fitting = [question for question, ids in prompts.items() if len(ids) <= longest]
        chosen = fitting[:: max(1, len(fitting) // N_SAMPLES)][:N_SAMPLES]
        return [self._answer(model, question, prompts[question]) for question in chosen]

    def sample(self, model: Transformer) -> str:
        """Return `answers` as text: question, answer, and a mark where the model ended its turn."""
        return "\n\n".join(
            f"> {a.question}\n{a.answer}{' ■' if a.ended else ' …'}" for a in self.answers(model)
        )

    def _load(self, chat: Path, split: Split) -> tuple[list[Conversation], list[Example]]:
        """Return the conversations of one split, and as examples."""
        path = conversations_path(chat, self.part, split)
        conversations = load_conversations(path)
        examples = encode_conversations(
            conversations, self.template, self.tokenizer, self.max_tokens
        )
        if not examples:
            raise DataError(f"{path}: no conversation here; change the chat section of params.yaml")
        return conversations, examples

    @torch.no_grad()
    def _nats(self, model: Transformer, rows: Sequence[Sequence[int]]) -> float:
        """Return the sum of -ln p over the answers in rows of held-out examples."""
        packed = [[self._val_examples[i] for i in row] for row in rows]
        batch = build_batch(packed, self.params.seq_len, self.tokenizer.id_of(PAD))
        device = model.rope_cos.device
        assert batch.document_ids is not None  # build_batch always tells conversations apart
        ids, targets, documents = (
            torch.from_numpy(array).to(device)
            for array in (batch.ids, batch.targets, batch.document_ids)
        )
        with autocast(self.params.precision, device):
            return float(next_token_loss(model(ids, document_ids=documents), targets))

    def _prompt(self, question: str) -> list[int]:
        """Return the ids after which the assistant speaks."""
        messages = [Message("user", question)]
        return self.template.encode(messages, self.tokenizer, add_generation_prompt=True)[0]

    def _answer(self, model: Transformer, question: str, prompt: list[int]) -> Answer:
        """Return the greedy answer to a question."""
        stop = [self.tokenizer.id_of(END_OF_TURN)]
        generation = generate(model, prompt, SamplingParams(max_new_tokens=SAMPLE_TOKENS), stop)
        text = self.tokenizer.decode(list(generation))
        return Answer(question=question, answer=text, ended=generation.reason == "stop")
