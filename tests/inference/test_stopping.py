import itertools
import random

import pytest

from tinyllm.inference.stopping import StopStrings


def cut_by_hand(text: str, stops: list[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize("seed", range(3))
def test_every_way_to_cut_a_text_gives_the_same_answer(seed):
    rng = random.Random(seed)
    for _ in range(60):
        text = "".join(rng.choices("ab\n", k=9))
        stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 4))) for _ in range(2)]
        for cuts in itertools.combinations(range(1, 9), 3):
            pieces = [text[a:b] for a, b in itertools.pairwise((0, *cuts, 9))]
            stop = StopStrings(stops)
            got = "".join(stop.feed(piece) for piece in pieces) + stop.finish()
            assert got == cut_by_hand(text, stops), (pieces, stops)
            assert stop.hit == any(s in text for s in stops)


def test_a_tail_is_held_back_only_while_it_may_become_a_stop():
    stop = StopStrings(["User:"])
    assert [stop.feed(piece) for piece in ("Hi U", "se", "d ", "Us")] == ["Hi ", "", "Used ", ""]
    assert stop.finish() == "Us"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop: an empty string"):
        StopStrings(["x", ""])
    assert StopStrings([]).feed("x") == "x"
