"""Several tokens per pass: a cheap draft guesses ahead, the model checks all guesses at once.

Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023,
arXiv:2302.01318): whatever the draft guesses, greedy text is the same and sampled text has exactly
the model's distribution. A draft that does not pay is switched off and tried again later.
Dimensions: T guesses, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.inference.drafts import Draft
from tinyllm.inference.generate import Generation, check_prompt
from tinyllm.inference.sampling import SamplingParams, draw, token_odds
from tinyllm.model.transformer import Transformer

PLAIN_TOKENS, DRAFT_ROUNDS, LONGEST_PAUSE = 4, 3, 256
"""What is timed before a choice: tokens without and rounds with the draft; tokens between tries."""


@dataclass(slots=True)
class SpeculationStats:
    """What the guesses were good for."""

    n_rounds: int = 0
    """Passes that checked guesses."""
    n_proposed: int = 0
    """Guesses that were checked."""
    n_accepted: int = 0
    """Guesses that became text."""
    n_plain: int = 0
    """Passes without guesses."""

    @property
    def acceptance(self) -> float:
        """Share of the guesses that became text; 0 without guesses."""
        return self.n_accepted / max(1, self.n_proposed)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass of the model: 1 without speculation."""
        passes = self.n_rounds + self.n_plain
        return (passes + self.n_accepted) / max(1, passes)


class Payoff:
    """Decides whether to guess, from the time that tokens took with guesses and without.

    Phases take turns: some plain tokens, some rounds of guesses; as long as the guesses are faster
    they go on, else they pause, each time four times as long.
    """

    def __init__(self) -> None:
        self._plain_left, self._rounds_left, self._pause = PLAIN_TOKENS, 0, PLAIN_TOKENS
        self._plain, self._guessed = (0, 0.0), (0, 0.0)  # tokens and seconds of the last phase

    @property
    def is_on(self) -> bool:
        """Whether the next pass should have guesses."""
        return self._rounds_left > 0

    def note(self, n_tokens: int, seconds: float, *, guessed: bool) -> None:
        """Count a pass."""
        if guessed:
            self._guessed = self._guessed[0] + n_tokens, self._guessed[1] + seconds
            self._rounds_left -= 1
            if self._rounds_left == 0:
                self._decide()
        elif self._plain_left > 0:
            self._plain = self._plain[0] + n_tokens, self._plain[1] + seconds
            self._plain_left -= n_tokens
            if self._plain_left <= 0:
                self._rounds_left, self._guessed = DRAFT_ROUNDS, (0, 0.0)

    def _decide(self) -> None:
        """Go on with guesses if they were faster, else pause and time plain tokens again."""
        (n_plain, plain_s), (n_guessed, guessed_s) = self._plain, self._guessed
        if guessed_s * n_plain < plain_s * n_guessed:
            self._rounds_left, self._guessed = DRAFT_ROUNDS, (0, 0.0)
            self._pause = PLAIN_TOKENS
        else:
            self._pause = min(4 * self._pause, LONGEST_PAUSE)
            self._plain_left, self._plain = self._pause, (0, 0.0)


class Speculation(Generation):
    """The tokens of one answer as they come, as `Generation`, faster where guesses hit."""

    def __init__(
        self,
        model: Transformer,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stop_ids: Collection[int],
        *,
        draft: Draft,
        n_draft: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(model, prompt_ids, sampling, stop_ids, use_cache=True)
        self.stats = SpeculationStats()
        self.payoff = Payoff()
        self._draft, self._n_draft, self._clock = draft, n_draft, clock
        self._ready: deque[int] = deque()

    def _choose(self) -> int:
        """Return the next token: one that is ready, or the first of another pass."""
        if not self._ready:
            self._ready.extend(self._pass())
        return self._ready.popleft()

    def _pass(self) -> list[int]:
        """Return the tokens of one pass of the model, at least one."""
        assert self._reader is not None
        cache = self._reader.cache
        started_s, is_prompt = self._clock(), cache.length == 0
        room = min(self._n_draft, cache.max_len - len(self._ids))
        guesses: list[int] = []
        odds_TV: Tensor | None = None
        if self.payoff.is_on and not is_prompt and room > 0:
            guesses, odds_TV = self._draft.propose(self._ids, room)
        if guesses:
            tokens = self._check(guesses, odds_TV)
            self.stats.n_rounds += 1
            self.stats.n_proposed += len(guesses)
            self.stats.n_accepted += len(tokens) - 1
        else:
            tokens = [super()._choose()]
            self.stats.n_plain += 1
        if not is_prompt:
            self.payoff.note(len(tokens), self._clock() - started_s, guessed=bool(guesses))
        return tokens

    def _check(self, guesses: list[int], odds_TV: Tensor | None) -> list[int]:
        """Return the guesses that stand, and the model's own token behind them."""
        assert self._reader is not None
        cache = self._reader.cache
        new = [*self._ids[cache.length :], *guesses]
        with torch.inference_mode():
            hidden = self._model.hidden(torch.tensor([new], device=self._device), cache=cache)
            logits_TV = self._model.head(hidden[0, -len(guesses) - 1 :])
        odds = token_odds(logits_TV, self._seen_with(guesses), self._sampling)
        tokens = accept(odds, guesses, odds_TV, self._generator)
        cache.truncate(len(self._ids) + len(tokens) - 1)
        return tokens

    def _seen_with(self, guesses: list[int]) -> Tensor | None:
        """Return which tokens occurred before each of the checked positions, (T + 1, V)."""
        if self._seen is None:
            return None
        seen = self._seen.repeat(len(guesses) + 1, 1)
        for i, token in enumerate(guesses):
            seen[i + 1 :, token] = True
        return seen


def speculate(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    stop_ids: Collection[int],
    draft: Draft,
    *,
    n_draft: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Speculation:
    """Return an iterator over the tokens that continue a prompt; arguments as in `generate`.

    Args:
        model: in evaluation mode.
        prompt_ids: at least one token.
        sampling: how tokens are chosen, and how many at most.
        stop_ids: tokens that end the text; they are not returned.
        draft: where guesses come from; it belongs to this text alone.
        n_draft: guesses per pass at most.
        clock: seconds; decides when guesses pay.

    Raises:
        DataError: the prompt is empty or fills the model's context.
    """
    check_prompt(model, prompt_ids)
    return Speculation(
        model, prompt_ids, sampling, stop_ids, draft=draft, n_draft=n_draft, clock=clock
    )


def accept(
    target_TV: Tensor, guesses: Sequence[int], draft_TV: Tensor | None, generator: torch.Generator
) -> list[int]:
    """Return the accepted guesses and one more token.

    Guess x stands with probability min(1, p(x) / q(x)); the first that falls is replaced by a draw
    from max(p - q, 0), normalised; if all stand, the last row gives one more. The result has the
    distribution p. arXiv:2211.17192, algorithm 1 and theorem 1 of arXiv:2302.01318.

    Args:
        target_TV: p, the model's odds at each guess and behind the last one, (T + 1, V).
        guesses: T tokens.
        draft_TV: q, the odds they were drawn with, (T, V); None: each guess was certain.
        generator: the source of the draws.
    """
    taken: list[int] = []
    for i, guess in enumerate(guesses):
        p_V = target_TV[i]
        q = 1.0 if draft_TV is None else float(draft_TV[i, guess])
        drawn = float(torch.rand((), generator=generator, device=p_V.device))
        if drawn * q < float(p_V[guess]):
            taken.append(guess)
            continue
        rest_V = p_V.clone()
        if draft_TV is None:
            rest_V[guess] = 0
        else:
            rest_V = (p_V - draft_TV[i]).clamp(min=0)
        return [*taken, *draw(rest_V[None], generator)]
    return [*taken, *draw(target_TV[-1:], generator)]
