"""Proof that an exported model is the same model: other runtimes against ours, in fp32.

Our model is the reference. Every runtime reads the same held-out tokens in one pass, then continues
the prompts greedily with its own cache. Equal logits in one pass prove the weights and the
arithmetic; equal tokens prove the cache. Dimensions: T positions, V vocabulary.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from tinyllm.errors import GateError
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.transformer import Transformer
from tinyllm.tokenizer.chat import ChatTemplate, Message
from tinyllm.tokenizer.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]


class Runtime(Protocol):
    """Something that runs the model."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """Return the logits of every position of one sequence, (T, V), in one pass."""

    def greedy(self, prompt_ids: Sequence[int], n_tokens: int) -> tuple[list[int], Logits]:
        """Return the likeliest continuation and the logits each token was taken from."""


@runtime_checkable
class TextRuntime(Protocol):
    """Something that turns text into token ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""


@runtime_checkable
class ChatRuntime(TextRuntime, Protocol):
    """Something that also turns conversations into token ids."""

    def render(self, chat: Sequence[Message]) -> tuple[str, list[int]]:
        """Return a conversation that waits for an answer, as text and as ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What our model says about one prompt."""

    prompt_ids: list[int]
    """Where the text begins."""
    answer: list[int]
    """Our greedy continuation."""
    logits: Logits
    """(prompt + answer - 1, V): of every position that predicts another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far one runtime is from ours."""

    positions: int
    """Compared in one pass."""
    max_logit_diff: float
    """Largest |difference| of a logit in one pass."""
    kl: float
    """Mean over the positions of the divergence of its prediction from ours, in nats."""
    top1_agreement: float
    """Share of positions with the same likeliest token."""
    greedy_tokens: int
    """Asked for, over all prompts."""
    greedy_equal_tokens: int
    """Before the first different one, over all prompts."""
    first_divergence: int
    """Equal tokens of the continuation that parts first; of the shortest one where none does."""
    max_cached_logit_diff: float
    """Largest |difference| while the continuations are equal: of the cached path."""
    divergence_margin: float
    """Our gap between the two likeliest tokens where a continuation parts; 0 if none does."""
    tokens_per_s: float
    """Of the continuations, the reading of the prompt included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextParity:
    """How far another tokenizer and chat template are from ours."""

    texts: int
    """Compared."""
    text_tokens: int
    """Of them, by our count."""
    unequal_texts: int
    """With other ids."""
    chats: int
    """Compared, as text and as ids."""
    unequal_chats: int
    """With another text or other ids."""


def build_references(
    model: Transformer, prompts: Sequence[list[int]], n_tokens: int
) -> list[Reference]:
    """Continue every prompt greedily with our model and keep its logits.

    Args:
        model: float, on the CPU, in evaluation mode.
        prompts: token ids; each shorter than the context.
        n_tokens: to continue with; fewer where the context ends.
    """
    references = []
    for prompt_ids in prompts:
        n = min(n_tokens, model.config.max_seq_len - len(prompt_ids))
        answer = list(generate(model, prompt_ids, SamplingParams(max_new_tokens=n), ()))
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt_ids, *answer[:-1]]]))[0].numpy()
        references.append(Reference(prompt_ids=prompt_ids, answer=answer, logits=logits))
    return references


def compare(references: Sequence[Reference], runtime: Runtime) -> Parity:
    """Measure a runtime against ours."""
    positions, agreed, asked, margin, nats, seconds = 0, 0, 0, 0.0, 0.0, 0.0
    diffs, cached_diffs, equal = [], [], []
    for reference in references:
        theirs = runtime.logits([*reference.prompt_ids, *reference.answer[:-1]])
        diffs.append(np.abs(theirs - reference.logits).max())
        nats += float(kl_divergence(reference.logits, theirs).sum())
        agreed += int((theirs.argmax(-1) == reference.logits.argmax(-1)).sum())
        positions += len(theirs)
        began_s = time.perf_counter()
        answer, steps = runtime.greedy(reference.prompt_ids, len(reference.answer))
        seconds += time.perf_counter() - began_s
        n = _n_equal(answer, reference.answer)
        ours = reference.logits[len(reference.prompt_ids) - 1 :]
        seen = min(n + 1, len(ours))  # the step that parts was still taken after an equal text
        cached_diffs.append(np.abs(steps[:seen] - ours[:seen]).max())
        if n < len(reference.answer):
            second, first = np.sort(ours[n])[-2:]
            margin = max(margin, float(first - second))
        equal.append((n == len(reference.answer), n))
        asked += len(reference.answer)
    return Parity(
        positions=positions,
        max_logit_diff=float(np.max(diffs)),  # a NaN stays, unlike with max()
        kl=nats / positions,
        top1_agreement=agreed / positions,
        greedy_tokens=asked,
        greedy_equal_tokens=sum(n for _, n in equal),
        first_divergence=min(equal)[1],
        max_cached_logit_diff=float(np.max(cached_diffs)),
        divergence_margin=margin,
        tokens_per_s=asked / seconds,
    )


def kl_divergence(ours_TV: Logits, theirs_TV: Logits) -> npt.NDArray[np.float64]:
    """Return sum p ln(p / q) of each position in nats, (T,), with p ours; in double precision."""
    p, q = (
        torch.from_numpy(np.asarray(logits)).double().log_softmax(-1)
        for logits in (ours_TV, theirs_TV)
    )
    nats: npt.NDArray[np.float64] = (p.exp() * (p - q)).sum(-1).numpy()
    return nats


def count_unequal(encoded: Sequence[tuple[str, list[int]]], theirs: TextRuntime) -> int:
    """Return how many texts get other ids.

    Args:
        encoded: each text with our ids.
        theirs: the other tokenizer.
    """
    return sum(theirs.encode(text) != ids for text, ids in encoded)


def compare_text(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    texts: Sequence[str],
    chats: Sequence[Sequence[Message]],
    theirs: ChatRuntime,
) -> TextParity:
    """Measure another tokenizer and chat template against ours."""
    encoded = tokenizer.encode_batch(list(texts))
    unequal_texts = count_unequal(list(zip(texts, encoded, strict=True)), theirs)
    unequal_chats = 0
    for chat in chats:
        ids, _ = template.encode(chat, tokenizer, add_generation_prompt=True)
        ours = template.render(chat, add_generation_prompt=True), ids
        unequal_chats += theirs.render(chat) != ours
    return TextParity(
        texts=len(texts),
        text_tokens=sum(map(len, encoded)),
        unequal_texts=unequal_texts,
        chats=len(chats),
        unequal_chats=unequal_chats,
    )


def check_parity(
    exact: Mapping[str, Parity], text: TextParity | None, max_logit_diff: float
) -> None:
    """Refuse an export that is not the same model.

    Continuations may part only at a tie: where our two likeliest tokens are closer than twice the
    largest allowed difference, rounding alone decides.

    Args:
        exact: the runtimes that compute in fp32, by name.
        text: tokenizer and chat template; None: not compared.
        max_logit_diff: the largest allowed one.

    Raises:
        GateError: one line per failure.
    """
    problems = []
    for name, parity in exact.items():
        worst = float(np.max([parity.max_logit_diff, parity.max_cached_logit_diff]))
        if not worst <= max_logit_diff:  # a NaN must fail
            problems.append(
                f"{name}: logits differ from ours by {worst:.2g}, allowed are {max_logit_diff:g}"
                " (export.max_logit_diff)"
            )
        if parity.divergence_margin > 2 * max_logit_diff:
            problems.append(
                f"{name}: greedy text parts from ours after {parity.greedy_equal_tokens} of"
                f" {parity.greedy_tokens} tokens, by a margin of {parity.divergence_margin:.2g}"
            )
    if text is not None and text.unequal_texts:
        problems.append(f"tokenizer: {text.unequal_texts} of {text.texts} texts get other ids")
    if text is not None and text.unequal_chats:
        problems.append(f"chat template: {text.unequal_chats} of {text.chats} conversations differ")
    if problems:
        raise GateError("\n".join(f"export: {problem}" for problem in problems))


def cut_prompts(texts: Sequence[list[int]], n_prompts: int, n_tokens: int) -> list[list[int]]:
    """Return passages spread evenly over encoded texts, one text after the other.

    >>> cut_prompts([[1, 2, 3, 4], [5, 6]], 3, 2)
    [[1, 2], [5, 6], [3, 4]]
    """
    rounds = -(-n_prompts // len(texts))
    passages = []
    for i in range(n_prompts):
        text, turn = texts[i % len(texts)], i // len(texts)
        start = max(0, (len(text) - n_tokens) * turn // max(1, rounds - 1))
        passages.append(text[start : start + n_tokens])
    return passages


def _n_equal(answer: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens are equal before the first different one."""
    for i, (a, b) in enumerate(zip(answer, other, strict=True)):
        if a != b:
            return i
    return len(other)
