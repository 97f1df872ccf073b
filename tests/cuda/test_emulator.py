import ctypes

import emulator
import pytest
import torch

from tinyllm.ops.launch import Launch


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "xwy"),
        ("n", ctypes.c_int64),
    )


def run(entry, y, x=None, w=None, n=0, *, seed=0, grid=(1, 1, 1), threads=32, shared=0):
    x, w = (None if t is None else t.data_ptr() for t in (x, w))
    launch = Launch(
        source="../emu/probe.cu",
        entry=entry,
        grid=grid,
        block=(threads, 1, 1),
        shared_bytes=shared,
        arguments=Arguments(x, w, y.data_ptr(), n),
    )
    return emulator.run(launch, seed)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_share_their_memory_and_shuffle(seed):
    x = torch.randint(-99, 100, (3000,)).float()  # whole numbers: every order gives the same sum
    y = torch.full((3,), torch.nan)
    run("probe_sum", y, x, n=3000, seed=seed, grid=(3, 1, 1), threads=128, shared=16)
    assert torch.equal(y, x.view(3, -1).sum(1))


@pytest.mark.parametrize("seed", range(3))
def test_collectives_give_every_lane_its_own(seed):
    y = torch.zeros(32, 7, dtype=torch.int32)
    run("probe_warp", y, seed=seed)
    lane = torch.arange(32)
    expected = [
        10 * (lane ^ 3),
        torch.full((32,), 50),
        10 * torch.where(lane < 28, lane + 4, lane),
        10 * torch.where(lane >= 4, lane - 4, lane),
        torch.full((32,), sum(1 << i for i in range(0, 32, 3))),
        torch.full((32,), 1),
        torch.full((32,), 310),
    ]
    assert y.long().T.tolist() == [e.tolist() for e in expected]


def test_formats_round_as_torch_rounds():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    numbers = torch.cat(
        [
            bits.view(torch.float16).float(),
            bits.view(torch.bfloat16).float(),
            torch.randn(10000) * torch.logspace(-30, 30, 10000, base=2),
            torch.tensor([65519.0, 65520.0, -65520.0, 2.0**-25, 1.5 * 2.0**-25, 3e38, 3.4e38]),
            torch.arange(4096) * 2.0**-26 + 2.0**-14,  # around the least normal fp16 number
        ]
    )
    y = torch.zeros(len(numbers), 2)
    run("probe_formats", y, numbers, n=len(numbers))
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        expected = numbers.to(dtype).float()
        assert torch.equal(y[:, i].nan_to_num(1e9), expected.nan_to_num(1e9))


def test_tensor_cores_multiply_matrices():
    x, w = (torch.randn(n, 16).bfloat16() for n in (16, 8))
    y = torch.full((16, 8), torch.nan)
    run("probe_mma", y, x, w, shared=24 * 32)
    torch.testing.assert_close(y, x.float() @ w.float().T, rtol=1e-5, atol=1e-5)
    x, w = (torch.randint(-128, 128, (n, 32), dtype=torch.int8) for n in (16, 8))
    y = torch.zeros(16, 8, dtype=torch.int32)
    run("probe_mma_s8", y, x, w)
    assert torch.equal(y, x.int() @ w.int().T)


def test_a_tile_without_swizzle_has_bank_conflicts():
    """Rows of 32 bytes: 8 rows of a matrix lie in 4 of the 8 groups of banks, twice each."""
    x = torch.zeros(16, 16).bfloat16()
    assert run("probe_mma", torch.zeros(16, 8), x, x, shared=24 * 32) == 8


def test_atomics_count_every_thread():
    y = torch.zeros(1, dtype=torch.int32)
    run("probe_atomic", y, grid=(2, 3, 1), threads=64)
    assert y == 6 * sum(range(64))


FAULTS = {
    0: "waits for ever at __syncthreads.*thread 40 has returned",
    2: "waits for ever at .*__(syncthreads|shfl_xor_sync)",
    3: "byte 256 of 256 of shared memory",
    4: "byte -114832 of 256 of shared memory",
    5: "load_16 from",
    6: r"cp_async: byte \d+ of 256",
    7: "waits for ever at",
    8: "the full mask only",
    9: "reads or writes address",
    10: "waits for ever at __syncthreads",
    11: "ldmatrix_x4: shared address is not a multiple of 16",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, seed):
    with pytest.raises(emulator.EmulatorError, match=FAULTS[fault]):
        run("probe_fault", torch.zeros(64), n=fault, seed=seed, threads=64, shared=256)


def test_what_is_right_is_not_called_a_fault():
    assert run("probe_fault", torch.zeros(64), n=1, threads=64, shared=256) == 0


@pytest.mark.parametrize("fault", [12, 13])
def test_memory_that_was_not_written_is_nan(fault):
    y, x = torch.zeros(64), torch.ones(64)
    run("probe_fault", y, x, n=fault, threads=64, shared=256)
    assert y[: 64 if fault == 12 else 16].isnan().all()


def test_a_launch_that_no_card_takes_is_refused():
    y = torch.zeros(1)
    for threads, shared, message in (
        (64, 0, "64 threads"),
        (30, 0, "30 threads"),
        (32, 101377, "101377 bytes of shared memory, at most 101376"),
    ):
        with pytest.raises(emulator.EmulatorError, match=message):
            run("probe_warp", y, threads=threads, shared=shared)
    with pytest.raises(emulator.EmulatorError, match="grid 0 x 1 x 1"):
        run("probe_warp", y, grid=(0, 1, 1))
