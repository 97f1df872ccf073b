"""A conversation with one model: history, trimming when the context is full, text as it comes."""

from collections.abc import Iterator
from dataclasses import replace

from tinyllm.errors import DataError
from tinyllm.inference.generate import Generation, generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.transformer import Transformer
from tinyllm.tokenizer.chat import ChatTemplate, Message
from tinyllm.tokenizer.special import END_OF_TEXT, END_OF_TURN
from tinyllm.tokenizer.tokenizer import TextStream, Tokenizer

ANSWER_SHARE = 2
"""At least 1 / this of the context is kept free for an answer, if so many tokens are asked for."""


def stream_text(tokens: Generation, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of tokens as they come, a character once its last byte is there."""
    text = TextStream(tokenizer)
    for token in tokens:
        if piece := text.feed(token):
            yield piece
    if piece := text.finish():
        yield piece


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a text or a turn."""
    return frozenset({tokenizer.id_of(END_OF_TEXT), tokenizer.id_of(END_OF_TURN)})


class Conversation:
    """What was said so far, and the next answer."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        system: str | None = None,
    ) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._system = [Message("system", system)] if system else []
        self.turns: list[Message] = []
        """Questions and answers in turn; the oldest pairs go when the context is full."""
        self._n_asked = 0

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turns = []

    def ask(self, question: str, sampling: SamplingParams) -> Iterator[str]:
        """Yield the answer to a question piece by piece, and remember both.

        An answer that is cut short from outside is remembered as far as it came.

        Args:
            question: what the user says.
            sampling: how tokens are chosen; each question has its own seed, counted up from here.

        Raises:
            DataError: the question alone does not fit into the model's context.
        """
        asked = Message("user", question)
        prompt = self._fit(asked, sampling.max_new_tokens)
        sampling = replace(sampling, seed=sampling.seed + self._n_asked)
        self._n_asked += 1
        tokens = generate(self._model, prompt, sampling, stop_ids(self._tokenizer))
        answer = ""
        try:
            for piece in stream_text(tokens, self._tokenizer):
                answer += piece
                yield piece
        finally:
            self.turns += [asked, Message("assistant", answer)]

    def _fit(self, asked: Message, n_wanted: int) -> list[int]:
        """Return the prompt; forget the oldest turns until an answer has room behind it."""
        context = self._model.config.max_seq_len
        room = context - min(n_wanted, context // ANSWER_SHARE)
        while True:
            messages = [*self._system, *self.turns, asked]
            ids, _ = self._template.encode(messages, self._tokenizer, add_generation_prompt=True)
            if len(ids) <= room:
                return ids
            if not self.turns:
                raise DataError(
                    f"question: takes {len(ids)} tokens with the system message, there is room for"
                    f" {room} of {context}; shorten it or ask for fewer tokens"
                )
            self.turns = self.turns[2:]
