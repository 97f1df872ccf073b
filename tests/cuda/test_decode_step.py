"""A whole model decodes through the kernel: the emulator is the card, or a card is."""

import emulator
import pytest
import torch
from tiny_lm import VOCAB, tiny_model

from tinyllm.inference.cache import KVCache
from tinyllm.inference.graph import DecodeStep
from tinyllm.ops import cuda_driver

IDS = torch.randint(VOCAB, (14,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPT = 4
WIDE = {"n_heads": 6, "n_kv_heads": 2, "d_head": 32}
KINDS = {
    "shared keys": WIDE,
    "a window": {**WIDE, "window": 5, "window_layers": (0,)},
}


@pytest.fixture(params=["emulator", pytest.param("card", marks=pytest.mark.gpu)])
def attended(request, monkeypatch):
    """The device, and the launches of decode attention as they come."""
    monkeypatch.setenv("TINYLLM_KERNELS", "cuda" if request.param == "emulator" else "auto")
    execute, launches = cuda_driver.run, []
    if request.param == "emulator":
        execute = emulator.run
        for name in ("refuses", "obstacle"):
            monkeypatch.setattr(cuda_driver, name, lambda *_: None)

    def run(launch):
        if launch.entry == "decode_attention":
            launches.append(launch)
        execute(launch)

    monkeypatch.setattr(cuda_driver, "run", run)
    return "cpu" if request.param == "emulator" else "cuda", launches


def logits(model, dtype, device, *, with_step):
    """Return the logits after every token behind the prompt, from a cache with room to spare."""
    model = model.to(dtype)
    cache = KVCache(model.config, 1, 40, dtype, device)
    for stored in (part for layer in cache.memory() for part in layer):
        stored.numbers.fill_(torch.nan)  # the kernel must not read what is empty
    prompt, rest = torch.tensor([IDS[:PROMPT]], device=device), IDS[PROMPT:]
    model.hidden(prompt, cache=cache)
    if with_step:
        step = DecodeStep(model, cache.memory())
        return torch.cat([step(token, cache.reserve(1)).clone() for token in rest]).double()
    ids = torch.tensor(rest, device=device).view(-1, 1, 1)
    return torch.cat([model.next_logits(one, cache) for one in ids]).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_the_step_is_as_near_to_fp64_as_the_growing_cache(attended, kind, dtype):
    device, launches = attended
    model = tiny_model(**KINDS[kind]).to(dtype).to(device)
    ours = logits(model, dtype, device, with_step=True)
    n_steps = len(IDS) - PROMPT if device == "cpu" else 3  # a graph: two to warm up, one recorded
    assert len(launches) == n_steps * model.config.n_layers
    grown = logits(model, dtype, device, with_step=False)
    exact = logits(model, torch.float64, device, with_step=False)
    for position, truth in enumerate(exact):
        error, allowed = ((x[position] - truth).norm() for x in (ours, grown))
        assert error <= 2 * allowed
