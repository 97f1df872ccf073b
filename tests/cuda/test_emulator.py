import ctypes

import emulator
import pytest
import torch

from tinyllm.ops.launch import Launch


class Sum(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int64))


@pytest.mark.parametrize("seed", range(3))
def test_sum(seed):
    x, y = torch.randn(3000), torch.full((3,), torch.nan)
    launch = Launch(
        source="../emu/probe.cu",
        entry="probe_sum",
        grid=(3, 1, 1),
        block=(128, 1, 1),
        shared_bytes=16,
        arguments=Sum(x.data_ptr(), y.data_ptr(), x.numel()),
    )
    emulator.run(launch, seed)
    torch.testing.assert_close(y, x.view(3, -1).sum(1))
