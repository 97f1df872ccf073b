"""The way from a `Launch` to the driver, with a driver that only writes down what it is asked."""

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinyllm.ops import cuda_build, cuda_driver, registry
from tinyllm.ops.launch import Launch, TensorMap

SOURCE = """struct Arguments { float* x; long long n; };
extern "C" __global__ void add(const __grid_constant__ Arguments p) { p.x[threadIdx.x] += 1; }
"""
TILED = ("interleave", "swizzle", "promotion", "fill")
GPU, STREAM = torch.device("cuda", 0), 0x1234


class Arguments(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("n", ctypes.c_int64))


class SeenTensor(ctypes.Structure):
    """Likewise, what a tensor map is made of."""

    _fields_ = (
        ("address", ctypes.c_long),
        ("sizes", ctypes.c_long * 4),
        ("strides", ctypes.c_long * 3),
        ("box", ctypes.c_uint * 4),
        *((name, ctypes.c_uint) for name in ("type", "rank", *TILED)),
    )


class Seen(ctypes.Structure):
    """As in fake_driver.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("images", "shared_limit", "stream")),
        ("extents", ctypes.c_uint * 7),
        ("arguments", Arguments),
        ("tensor", SeenTensor),
    )


def forget():
    for cached in (
        *(cuda_driver._module, cuda_driver._function, cuda_driver._driver),
        *(cuda_driver._card_obstacle, cuda_build.compiler),
    ):
        cached.cache_clear()


@pytest.fixture
def card(monkeypatch, tmp_path):
    """An RTX 3060 by its looks; the fixture is its library's memory."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libcuda.so"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    (tmp_path / "add.cu").write_text(SOURCE)
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path)
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_driver, "DRIVER", str(library))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    for name, value in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_capability", (8, 6)),
        ("current_stream", SimpleNamespace(cuda_stream=STREAM)),
        ("synchronize", None),
    ):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    forget()
    yield Seen.in_dll(ctypes.CDLL(str(library)), "seen")
    forget()


def launch(**changes):
    return Launch(
        **{
            **{"source": "add.cu", "entry": "add", "grid": (5, 4, 3), "block": (32, 2, 1)},
            **{"shared_bytes": 0, "arguments": Arguments(0xABCDEF, 1 << 40)},
            **changes,
        }
    )


def test_the_driver_gets_what_the_launch_says(card):
    assert cuda_driver.refuses(GPU, "add.cu") is None
    cuda_driver.run(launch())
    assert list(card.extents) == [5, 4, 3, 32, 2, 1, 0]
    assert (card.arguments.x, card.arguments.n) == (0xABCDEF, 1 << 40)
    assert card.stream == STREAM


def test_tensor_maps_are_encoded_into_the_arguments(card):
    driver = pytest.importorskip("cuda.bindings.driver")
    tensor = TensorMap(address=0xAB00, sizes=(64, 9, 4, 2), strides=(512, 128, 4608), rows=128)
    arguments = (ctypes.c_ubyte * 400)()
    cuda_driver.run(launch(arguments=arguments, tensors=(tensor, tensor)))
    assert bytes(arguments) == b"\x5a" * 256 + bytes(144)
    seen = card.tensor
    assert (seen.address, *seen.sizes, *seen.strides) == (0xAB00, 64, 9, 4, 2, 512, 128, 4608)
    assert [*seen.box, seen.rank] == [64, 128, 1, 1, 4]
    assert seen.type == driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16.value
    assert [getattr(seen, name) for name in TILED] == [
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE.value,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B.value,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B.value,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE.value,
    ]


def test_a_source_is_loaded_once(card):
    for _ in range(3):
        cuda_driver.run(launch())
    assert card.images == 1


@pytest.mark.parametrize(("shared_bytes", "limit"), [(48 * 1024, 0), (99 * 1024, 99 * 1024)])
def test_more_shared_memory_than_usual_is_asked_for(card, shared_bytes, limit):
    cuda_driver.run(launch(shared_bytes=shared_bytes))
    assert card.shared_limit == limit
    assert card.extents[6] == shared_bytes


def test_the_drivers_words_are_told(card):
    with pytest.raises(cuda_driver.DriverError, match="cuModuleGetFunction: named symbol not"):
        cuda_driver.run(launch(entry="subtract"))


def test_a_source_that_does_not_compile_is_refused_in_one_line(card, caplog):
    (cuda_build.SOURCES / "broken.cu").write_text("nonsense")
    for _ in range(2):
        assert "error" in cuda_driver.refuses(GPU, "broken.cu")
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith("broken.cu: using torch: ")


def test_a_driver_that_is_not_there_is_an_obstacle(card, monkeypatch):
    monkeypatch.setattr(cuda_driver, "DRIVER", "libnone.so.1")
    assert "libnone.so.1" in cuda_driver.refuses(GPU, "add.cu")


def test_an_old_card_is_refused(card, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 5))
    assert "7.5" in cuda_driver.obstacle(GPU)


def test_another_card_than_the_current_one_is_refused(card):
    assert cuda_driver.obstacle(torch.device("cuda", 1)) == "another card is current"


@pytest.mark.parametrize(
    ("device", "reason"), [("cpu", "are on cpu"), ("cuda", "sees no CUDA device")]
)
def test_without_a_card_nothing_is_compiled(monkeypatch, device, reason):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(cuda_build, "compiler", pytest.fail)
    assert reason in cuda_driver.refuses(torch.device(device), "add.cu")


def test_doctor_tells_what_runs_on_the_card(card, monkeypatch):
    monkeypatch.delenv("TINYLLM_KERNELS", raising=False)
    rows = {row.operation: row for row in registry.describe()}
    row = rows["attention on the GPU"]
    assert row.backend == "cuda"
    assert row.why == f"CUDA C++ for sm_86, compiled by {cuda_build.compiler().name}"
    assert rows["decoder on the GPU"].why == "no CUDA kernel of ours"


def test_doctor_tells_why_nothing_does(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (row,) = [row for row in registry.describe() if row.operation == "on a GPU"]
    assert (row.backend, row.why) == ("none", "torch sees no CUDA device")
