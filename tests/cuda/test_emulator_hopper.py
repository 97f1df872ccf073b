"""The emulator's wgmma, barriers and boxes against torch, and what they refuse."""

import ctypes

import emulator
import pytest
import torch

from tinyllm.ops.launch import TENSOR_MAP_BYTES, Launch, TensorMap

T = 80  # of the tensor; a box reaches beyond it


class Arguments(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_ubyte * TENSOR_MAP_BYTES),
        ("y", ctypes.c_void_p),
        ("n", ctypes.c_int64),
    )


def run(entry, y, x, n, seed=0):
    tensor = TensorMap(
        address=x.data_ptr(), sizes=(128, T, 1, 1), strides=(x.stride(0) * 2, 256, 256), rows=64
    )
    launch = Launch(
        source="../emu/probe_hopper.cu",
        entry=entry,
        grid=(1, 1, 1),
        block=(128, 1, 1),
        shared_bytes=2 * 8192 + 128 + 8,
        arguments=Arguments(y=y.data_ptr(), n=n),
        tensors=(tensor,),
    )
    return emulator.run(launch, seed)


@pytest.fixture
def x():
    """80 rows with NaN behind them, where no box may read."""
    rows = torch.full((T + 40, 136), torch.nan, dtype=torch.bfloat16)
    rows[:T, :128] = torch.randn(T, 128, generator=torch.Generator().manual_seed(0))
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_rows_by_rows_and_zeros_behind_the_tensor(x, seed):
    y = torch.full((64, 64), torch.nan)
    run("probe_rows", y, x, 3, seed)
    read = torch.zeros(64, 16)
    read[: T - 32] = x[32:T, 64 + 48 : 128].float()
    torch.testing.assert_close(y, read @ read.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_registers_by_columns_of_two_tiles(x, seed):
    y = torch.full((64, 128), torch.nan)
    run("probe_columns", y, x, 2, seed)
    a = torch.zeros(64, 16)  # the fragment's figure in the PTX ISA, "Matrix fragments for wgmma"
    for row in range(64):
        r = row % 16 % 8 % 4
        a[row, 2 * r + (9 if row % 16 >= 8 else 0)] = 1
    torch.testing.assert_close(y, 3 + a @ x[32:48, :128].float(), rtol=1e-5, atol=1e-5)


FAULTS = {
    0: "no wgmma_fence since",
    1: "knows the swizzle of 128 bytes only",
    2: "a tile reaches byte",
    3: "warps 0 and [23] of a group multiply different tiles",
    4: "the sums may not be there yet",
    5: "returns with 1 products in flight",
    6: "waits for ever at mbarrier_wait",
    7: "more than 1 arrivals in a phase",
    8: "mbarrier_wait: byte 16520 of 16520",
    9: "no place for a swizzled tile",
    10: "no fence_proxy_async has shown",
    11: "1 copies that no one waits for",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(x, fault):
    with pytest.raises(emulator.EmulatorError, match=FAULTS[fault]):
        run("probe_hopper_fault", torch.zeros(1), x, fault)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_right_is_not_called_a_fault(x, seed):
    run("probe_hopper_fault", torch.zeros(1), x, 99, seed)
