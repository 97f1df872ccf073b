import json
import os
import resource
import signal

import pytest
import torch
from tiny_trainer import CONFIG, KNOBS, Listener, figures, fingerprint, run_tiny

from tinyllm import paths
from tinyllm.errors import ParamsError, TrainingError
from tinyllm.training import state as state_module
from tinyllm.training.parallel import Team
from tinyllm.training.state import KEEP_IDENTITIES, describe, open_store

IDENTITY = {"params": {"seed": 1}}


@pytest.fixture(autouse=True)
def _inflight(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_INFLIGHT", str(tmp_path / "inflight"))
    for name in ("TINYLLM_FRESH", "TINYLLM_THREADS", "TINYLLM_DEVICE", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)


def a_state(step):
    return {"step": step, "weights": torch.full((1000,), float(step))}


def store_steps(root, *steps):
    with open_store(root, "stage", IDENTITY, Listener(), Team()) as store:
        for step in steps:
            store.save(a_state(step))
        return store.directory


def load(root):
    listener = Listener()
    with open_store(root, "stage", IDENTITY, listener, Team()) as store:
        return store.load(), listener.said


def test_the_last_two_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path):
    folder = store_steps(tmp_path, 5, 10, 15)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000010", "step-000015"]
    assert torch.equal(load(tmp_path)[0]["weights"], torch.full((1000,), 15.0))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda file: os.truncate(file, 700),
        lambda file: file.unlink(),
        lambda file: file.with_name("manifest.json").unlink(),
        lambda file: file.with_name("manifest.json").write_text("{"),
    ],
    ids=["flipped", "cut", "gone", "no manifest", "half a manifest"],
)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damage):
    folder = store_steps(tmp_path, 5, 10)
    damage(folder / "step-000010" / "state.pt")
    state, said = load(tmp_path)
    assert state["step"] == 5
    assert len(said) == 1
    assert said[0].startswith("checkpoint step-000010 is damaged")
    store_steps(tmp_path, 10)  # the same step again takes its place
    assert load(tmp_path)[0]["step"] == 10


def test_a_checkpoint_of_another_identity_is_not_taken(tmp_path):
    folder = store_steps(tmp_path, 5)
    with open_store(tmp_path, "stage", {"params": {"seed": 2}}, Listener(), Team()) as other:
        (folder / "step-000005").rename(other.directory / "step-000005")
        assert other.load() is None
        assert other.last_step is None


def test_a_second_trainer_is_refused_in_one_line(tmp_path):
    with (
        open_store(tmp_path, "stage", IDENTITY, Listener(), Team()),
        pytest.raises(TrainingError, match="another process trains this very run") as refused,
        open_store(tmp_path, "stage", IDENTITY, Listener(), Team()),
    ):
        pass
    assert "\n" not in str(refused.value)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    folder = store_steps(tmp_path, 5)
    (folder / ".tmp-10-1").mkdir()
    assert load(tmp_path)[0]["step"] == 5
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space")])
def test_a_failed_write_is_a_warning_and_the_older_checkpoint_stays(tmp_path, monkeypatch, error):
    store_steps(tmp_path, 5)

    def fail(*args):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    listener = Listener()
    with open_store(tmp_path, "stage", IDENTITY, listener, Team()) as store:
        store.load()
        store.save(a_state(10))
        assert store.last_step == 5
        assert not list(store.directory.glob(".tmp-*"))
    assert listener.said == [
        f"warning: no checkpoint at step 10: {error}; training goes on,"
        " last good checkpoint: step 5"
    ]
    monkeypatch.undo()


def test_a_disk_that_is_really_full_is_survived(tmp_path, monkeypatch):
    folder = store_steps(tmp_path, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        store_steps(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in folder.glob("step-*")] == ["step-000005"]
    assert load(tmp_path)[0]["step"] == 5


def test_differences_are_named_by_dotted_path():
    old = {"params": {"pretrain": {"lr": 0.003}, "seed": 1}, "code": {"tinyllm/model": "a" * 64}}
    new = {"params": {"pretrain": {"lr": 0.01}, "seed": 1}, "code": {"tinyllm/model": "b" * 64}}
    assert describe(old, new) == (
        "code.tinyllm/model aaaaaaaa -> bbbbbbbb, pretrain.lr 0.003 -> 0.01"
    )
    assert describe({"params": {}}, {"params": {"x": 1}}) == "x absent -> 1"


def test_only_the_newest_runs_stay_and_never_one_in_use(tmp_path):
    made = []
    for seed in range(KEEP_IDENTITIES + 3):
        with open_store(tmp_path, "stage", {"seed": seed}, Listener(), Team()) as store:
            made.append(store.directory)
        os.utime(made[-1], (seed, seed))
        os.utime(made[-1] / "identity.json", (seed, seed))
    with (
        open_store(tmp_path, "stage", {"seed": 0}, Listener(), Team()) as used,
        open_store(tmp_path, "stage", {"seed": 5}, Listener(), Team()) as store,
    ):
        os.utime(used.directory, (0, 0))
        os.utime(used.directory / "identity.json", (0, 0))
        store.prune_others()
        left = {path for path in made if path.exists()}
    assert left == {made[0], *made[-KEEP_IDENTITIES:]}


def test_a_finished_run_removes_the_oldest_others():
    for seed in range(KEEP_IDENTITIES + 1):
        run_tiny({"steps": 3}, identity={"seed": seed})
    left = {json.loads(p.read_text())["seed"] for p in paths.inflight_root().glob("tiny/*/id*")}
    assert left == set(range(1, KEEP_IDENTITIES + 1))


def test_same_seed_same_bits_and_another_batch_order_other_bits():
    fresh = {"identity": {"params": {"other": 1}}}
    first, second = fingerprint(*run_tiny()[:2]), fingerprint(*run_tiny(**fresh)[:2])
    assert first == second
    assert fingerprint(*run_tiny({"beta2": 0.9})[:2]) != first


def test_the_curve_and_the_samples_have_their_rows():
    _, result, batches = run_tiny()
    assert batches.asked == list(range(48))
    assert [row["step"] for row in result.curve] == [0, 4, 6, 8, 12, 16, 18, 20, 24]
    assert [row["step"] for row in result.curve if "val_loss" in row] == [0, 6, 12, 18, 24]
    assert [sample["step"] for sample in result.samples] == [0, 10, 20, 24]
    assert result.curve[0]["train_loss"] > result.curve[-1]["train_loss"]
    metrics = result.metrics
    assert metrics["tokens"] == 24 * 2 * 2 * 16
    assert metrics["tokens_per_s"] > 0
    assert 0 < metrics["mfu"] < 1
    assert metrics["peak_memory_bytes"] > 50_000_000
    json.dumps([result.curve, result.samples, metrics], allow_nan=False)


def test_a_finished_run_trains_no_step_again_unless_fresh_is_asked_for(monkeypatch):
    model, result, _ = run_tiny()
    again, same, batches = run_tiny()
    assert batches.asked == []
    assert fingerprint(again, same) == fingerprint(model, result)
    monkeypatch.setenv("TINYLLM_FRESH", "1")
    listener = Listener()
    assert len(run_tiny(progress=listener)[2].asked) == 48
    assert listener.said[0] == "tiny: FRESH, as TINYLLM_FRESH=1 asks"


def test_a_loss_that_is_not_finite_stops_before_it_is_saved():
    poisoned = {}

    def poison(model):
        poisoned["model"] = model
        return figures(model)

    def before(index):
        if index == 2 * 16:  # step 17; the last checkpoint is that of step 15
            poisoned["model"].embed_tokens.weight.data[0, 0] = float("nan")

    with pytest.raises(TrainingError, match="not finite") as stopped:
        run_tiny(before=before, evaluate=poison)
    message = str(stopped.value)
    assert "at step 17 of 24; last good checkpoint: it is kept at step 15; lower lr" in message
    assert "\n" not in message
    listener = Listener()
    run_tiny(progress=listener)
    assert listener.said[0] == "tiny: RESUME at step 15"


def test_a_full_disk_costs_the_checkpoints_not_the_run(monkeypatch):
    whole = fingerprint(*run_tiny({"beta1": 0.8})[:2])

    def fail(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(state_module.torch, "save", fail)
    monkeypatch.setenv("TINYLLM_FRESH", "1")
    listener = Listener()
    assert fingerprint(*run_tiny({"beta1": 0.8}, progress=listener)[:2]) == whole
    assert sum(line.startswith("warning: no checkpoint") for line in listener.said) == 5


def test_too_long_sequences_and_unknown_devices_are_refused_before_any_work(monkeypatch):
    with pytest.raises(ParamsError, match=r"tiny.seq_len: 17 .* model.max_seq_len = 16"):
        run_tiny({"seq_len": CONFIG.max_seq_len + 1})
    for name, value in (("TINYLLM_DEVICE", "gpu"), ("TINYLLM_THREADS", "two")):
        monkeypatch.setenv(name, value)
        with pytest.raises(TrainingError, match=f"{name}: '{value}' is not"):
            run_tiny()
        monkeypatch.delenv(name)
    assert not list(paths.inflight_root().glob("tiny/*/step-*"))
    assert KNOBS["seq_len"] == CONFIG.max_seq_len
