from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_trainer import CONFIG, KNOBS, CountingBatches, Listener
from torch.nn import functional as F

from tinyllm.model.init import build_model
from tinyllm.progress import Silent
from tinyllm.shards.batches import Batch
from tinyllm.training import step as step_module
from tinyllm.training.params import TrainingParams
from tinyllm.training.step import Stepper

CPU = torch.device("cpu")
PARAMS = TrainingParams(**{**KNOBS, "precision": "fp32", "optimizer": "adamw", "clip_norm": 0.0})


def stepper(params=PARAMS, *, compiled=False, progress=None):
    return Stepper(
        build_model(CONFIG, 0), params, CPU, compiled=compiled, progress=progress or Silent()
    )


def masked_batch(rows):
    """Return a batch whose rows have different numbers of targets."""
    batch = CountingBatches(replace(PARAMS, batch_size=rows)).batch(0)
    for i in range(rows):
        batch.targets[i, : 5 * i] = -100
    return batch


def rows_of(batch, rows):
    return Batch(batch.ids[rows], batch.targets[rows], None)


def test_accumulation_equals_the_big_batch():
    batch = masked_batch(3)
    big, small = stepper(), stepper()
    losses = [big._backward([batch]), small._backward([rows_of(batch, [i]) for i in range(3)])]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
    for one, other in zip(big.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=0)


def test_a_step_is_plain_torch():
    ours, batch = stepper(replace(PARAMS, clip_norm=0.5)), masked_batch(2)
    model = build_model(CONFIG, 0)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.95), fused=False)
    for step in range(3, 6):
        loss, norm = ours.run(step, [batch])
        logits = model(torch.from_numpy(batch.ids)).flatten(0, 1)
        expected = F.cross_entropy(logits, torch.from_numpy(batch.targets).flatten())
        reference.zero_grad()
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        reference.step()
        torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(norm, expected_norm, atol=1e-5, rtol=1e-4)
    for one, other in zip(ours.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_one_batch(precision):
    params = replace(PARAMS, precision=precision, lr=0.02, steps=40, schedule="cosine")
    ours, batch = stepper(params), masked_batch(2)
    losses = [float(ours.run(step, [batch])[0]) for step in range(40)]
    assert losses[0] == pytest.approx(np.log(48), abs=0.6)
    assert losses[-1] < 0.5
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())


def test_fp16_skips_a_step_whose_gradient_overflows_and_lowers_the_scale():
    ours = stepper(replace(PARAMS, precision="fp16"))
    ours.scaler.load_state_dict({**ours.scaler.state_dict(), "scale": 2.0**60})
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    ours.run(3, [masked_batch(2)])
    assert ours.scaler.get_scale() == 2.0**59
    assert all(map(torch.equal, before, ours.model.parameters()))


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_checkpointing_gives_the_same_step(mode):
    plain, saving = stepper(), stepper()
    saving.model.checkpoint = mode
    for ours in (plain, saving):
        ours.run(3, [masked_batch(2)])
    assert all(map(torch.equal, plain.model.parameters(), saving.model.parameters()))


def test_a_failing_compiler_gives_one_line_and_the_eager_step(monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def refuse(loss):
        def fail(*args):
            raise InvalidCxxCompiler

        return fail

    monkeypatch.setattr(step_module, "compile_loss", refuse)
    listener = Listener()
    ours, eager = stepper(compiled=True, progress=listener), stepper()
    for one in (ours, eager):
        one.run(3, [masked_batch(2)])
    assert [line.split(",")[0] for line in listener.said] == ["torch.compile does not work here"]
    assert ours.compiled is False
    assert all(map(torch.equal, ours.model.parameters(), eager.model.parameters()))
