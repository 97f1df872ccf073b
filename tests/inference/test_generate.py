import pytest
import torch
from tiny_lm import VOCAB, tiny_model

from tinyllm.errors import DataError
from tinyllm.inference.generate import compute_dtype, generate
from tinyllm.inference.sampling import SamplingParams

PROMPT = [5, 17, 42]


def greedy(n: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=n)


def test_greedy_with_cache_without_cache_and_by_hand_are_equal():
    model = tiny_model()
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(30):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    expected = ids[len(PROMPT) :]
    assert len(set(expected)) > 8  # else the test proves little
    assert list(generate(model, PROMPT, greedy(30), ())) == expected
    assert list(generate(model, PROMPT, greedy(30), (), use_cache=False)) == expected


def test_sampled_text_depends_on_the_seed_alone():
    model = tiny_model()
    texts = [
        list(
            generate(
                model,
                PROMPT,
                SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_new_tokens=20),
                (),
                use_cache=use_cache,
            )
        )
        for seed, use_cache in [(1, True), (1, True), (1, False), (2, True)]
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_it_streams_and_each_token_costs_one_step(monkeypatch):
    model = tiny_model()
    lengths = []
    forward = model.embed_tokens.forward
    monkeypatch.setattr(
        model.embed_tokens, "forward", lambda ids: lengths.append(ids.shape[1]) or forward(ids)
    )
    tokens = generate(model, PROMPT, greedy(10), ())
    assert lengths == []
    next(tokens)
    next(tokens)
    assert lengths == [3, 1]


def test_it_stops_at_a_stop_token_without_giving_it():
    model = tiny_model()
    free = list(generate(model, PROMPT, greedy(30), ()))
    stop = free[6]
    generation = generate(model, PROMPT, greedy(30), {stop})
    assert list(generation) == free[: free.index(stop)]
    assert generation.reason == "stop"
    assert list(generation) == []


def test_it_stops_at_the_limit_and_at_the_end_of_the_context():
    model = tiny_model()
    generation = generate(model, PROMPT, greedy(4), ())
    assert generation.reason is None
    assert (len(list(generation)), generation.reason) == (4, "length")
    for use_cache in (True, False):
        generation = generate(model, PROMPT, greedy(1000), (), use_cache=use_cache)
        assert len(list(generation)) == model.config.max_seq_len - len(PROMPT)
        assert generation.reason == "context"


def test_repetition_penalty_counts_prompt_and_answer():
    model = tiny_model()
    harsh = SamplingParams(repetition_penalty=1e9, max_new_tokens=40)
    answer = list(generate(model, PROMPT, harsh, ()))
    assert len(set(answer + PROMPT)) == len(answer) + len(PROMPT)


def test_generation_leaves_no_gradients_and_no_inference_mode_behind():
    model = tiny_model()
    generation = generate(model, PROMPT, greedy(3), ())
    next(generation)
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([PROMPT])).sum().backward()


@pytest.mark.parametrize("prompt", [[], list(range(48)), [1] * 60])
def test_a_prompt_that_does_not_fit_is_told_in_one_line(prompt):
    with pytest.raises(DataError, match=f"prompt: has {len(prompt)} tokens.* takes 1 to 47"):
        generate(tiny_model(), prompt, greedy(1), ())


def test_dtype_of_the_cache_is_the_models():
    assert compute_dtype(tiny_model()) == torch.float32
    assert compute_dtype(tiny_model().bfloat16()) == torch.bfloat16
    assert max(PROMPT) < VOCAB
