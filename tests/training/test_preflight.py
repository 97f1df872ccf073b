import copy
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_step import masked_batch
from tiny_trainer import CONFIG, KNOBS, run_tiny

from tinyllm.errors import TrainingError
from tinyllm.model.init import build_model
from tinyllm.shards.batches import Batch
from tinyllm.training import memory
from tinyllm.training import preflight as preflight_module
from tinyllm.training.params import TrainingParams
from tinyllm.training.preflight import check_shift, preflight

PARAMS = TrainingParams(**KNOBS)
CPU = torch.device("cpu")


def look(model=None, batch=None, *, fresh=True):
    preflight(
        model or build_model(CONFIG, 0),
        PARAMS,
        batch or masked_batch(2),
        CPU,
        stage="pretrain",
        fresh=fresh,
        whole=True,
    )


def refusal(**arguments):
    with pytest.raises(TrainingError) as refused:
        look(**arguments)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("pretrain: ")
    return line


def test_a_sound_run_passes_and_nothing_is_changed():
    model, state = build_model(CONFIG, 0).train(), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    started_s = time.perf_counter()
    look(model)
    assert time.perf_counter() - started_s < 2
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_run_behind_it_has_the_same_bits(tmp_path, monkeypatch):
    models = []
    for wanted in (False, True):
        monkeypatch.setenv("TINYLLM_INFLIGHT", str(tmp_path / str(wanted)))
        models.append(run_tiny({"preflight": wanted}, fresh=True)[0])
    assert all(map(torch.equal, *(model.parameters() for model in models)))


@pytest.mark.parametrize(
    ("shift", "message"),
    [(0, "not shifted"), (2, "shifted twice"), (5, "not the inputs shifted by one")],
)
def test_wrong_shifts_are_named(shift, message):
    tokens = np.random.default_rng(1).integers(0, 48, (2, 40))
    batch = Batch(tokens[:, :30].copy(), tokens[:, shift : 30 + shift].copy(), None)
    assert f"the targets are {message}" in refusal(batch=batch)


def test_masked_targets_and_the_borders_of_documents_are_no_wrong_shift():
    ids = np.array([[1, 2, 3, 7, 8, 9]])
    targets = np.array([[2, 3, 4, 8, -100, 5]])
    with pytest.raises(TrainingError):
        check_shift(Batch(ids, targets, None), "sft")
    check_shift(Batch(ids, targets, np.array([[0, 0, 0, 1, 1, 1]])), "sft")


def test_a_loud_start_is_refused_of_a_fresh_model_only():
    model = build_model(CONFIG, 0)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(50)
    assert "must begin near ln V = 3.87" in refusal(model=model)
    look(model, fresh=False)


def test_a_model_that_cannot_learn_is_refused():
    model = build_model(CONFIG, 0)
    model.hidden = lambda ids, **_: torch.zeros(*ids.shape, CONFIG.d, requires_grad=True)
    assert "does not learn one row by heart" in refusal(model=model)


def test_a_model_that_moves_far_with_every_step_is_not_refused(monkeypatch):
    """As a wide one does, whose outputs are sums of many weights."""
    monkeypatch.setattr(preflight_module, "OVERFIT_RATE", 0.1)
    look(build_model(CONFIG, 0), fresh=False)
    monkeypatch.setattr(preflight_module, "TOO_FAST", 1)
    assert "does not learn one row by heart" in refusal(model=build_model(CONFIG, 0))


def test_no_target_is_refused():
    batch = masked_batch(2)
    batch.targets[:] = -100
    assert "no target" in refusal(batch=batch)


def test_too_little_memory_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**5)
    assert "0.0 GB are free; lower pretrain.batch_size" in refusal()


def test_more_layers_cost_what_the_rehearsal_says():
    sizes = replace(CONFIG, d=64, d_ff=192, d_head=32, n_layers=5)
    straight = memory.estimate_memory(sizes, PARAMS, 2)
    with memory.FakeTensorMode():
        whole = memory._rehearse(memory.Transformer(sizes), PARAMS, 2, packed=False)
    assert straight.total == pytest.approx(whole.total, rel=0.02)
