"""Runs a `Launch` on a card, through the driver's plain C interface.

Nothing is looked for before the first tensor on a GPU asks; then the source is compiled for its
card (`cuda_build`) and loaded once. A source that cannot be had costs one line of log, and its
operations fall back.
"""

import ctypes
import functools
import logging
from typing import Any

import torch

from tinyllm.ops import cuda_build, tensor_map
from tinyllm.ops.build import BuildError
from tinyllm.ops.launch import Launch

DRIVER = "libcuda.so.1"
"""Comes with the card's driver."""
OLDEST = (8, 0)
"""Compute capability with `cp.async` and bf16 tensor cores."""
STATIC_SHARED_BYTES = 48 * 1024
"""More has to be asked for."""
MAX_DYNAMIC_SHARED_SIZE = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


class DriverError(RuntimeError):
    """The driver refuses; the message has its words."""


def refuses(device: torch.device, source: str, defines: tuple[str, ...] = ()) -> str | None:
    """Return why a program cannot run on a device, None if it can; compiles and loads it.

    Args:
        device: of its tensors.
        source: as in `Launch`.
        defines: likewise.
    """
    return obstacle(device) or _module(source, defines, torch.cuda.current_device())[1]


def obstacle(device: torch.device) -> str | None:
    """Return what stands against any kernel of ours on a device; never compiles or raises."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if device.index is None and not torch.cuda.is_available():  # a tensor would have an index
        return "torch sees no CUDA device"
    index = torch.cuda.current_device()
    return _card_obstacle(index) if device.index in (None, index) else "another card is current"


@functools.cache
def _card_obstacle(index: int) -> str | None:
    """Return what stands against a card, None if nothing does."""
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"the card's compute capability is {capability[0]}.{capability[1]}, 8.0 is needed"
    try:
        cuda_build.compiler()
        _driver()
    except (BuildError, OSError) as error:
        return str(error)
    return None


def architecture(index: int) -> str:
    """Return what a card is compiled for, such as "sm_86"."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def run(launch: Launch) -> None:
    """Put a launch into torch's current stream; it runs after what is there already.

    Its tensors lie on the current device. Memory that is freed afterwards is not reused before the
    kernel has ended, as the allocator goes by the same stream.

    Raises:
        DriverError: the driver refuses.
    """
    index = torch.cuda.current_device()
    function = _function(launch.source, launch.defines, launch.entry, launch.shared_bytes, index)
    tensor_map.encode(_ask, launch)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
    stream = torch.cuda.current_stream(index).cuda_stream
    _ask(
        "cuLaunchKernel",
        *(function, *launch.grid, *launch.block, launch.shared_bytes, stream, arguments, None),
    )


@functools.cache
def _module(
    source: str, defines: tuple[str, ...], index: int
) -> tuple[ctypes.c_void_p | None, str | None]:
    """Return a program on a card; or None and why not, said once."""
    module = ctypes.c_void_p()
    try:
        image = cuda_build.cubin(source, defines, architecture(index)).read_bytes()
        torch.cuda.synchronize(index)  # makes the card's context and gives it to this thread
        _ask("cuModuleLoadData", ctypes.byref(module), image)
    except (BuildError, DriverError, OSError) as error:
        reason = " ".join(str(error).split())
        logging.getLogger("tinyllm.ops").warning("%s: using torch: %s", source, reason)
        return None, reason
    return module, None


@functools.cache
def _function(
    source: str, defines: tuple[str, ...], entry: str, shared_bytes: int, index: int
) -> ctypes.c_void_p:
    """Return a kernel that may use that much shared memory."""
    module, reason = _module(source, defines, index)
    if module is None:
        raise DriverError(f"{source}: {reason}")
    function = ctypes.c_void_p()
    _ask("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
    if shared_bytes > STATIC_SHARED_BYTES:
        _ask("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE, shared_bytes)
    return function


@functools.cache
def _driver() -> ctypes.CDLL:
    """Return the driver's library.

    Raises:
        OSError: there is none.
    """
    driver = ctypes.CDLL(DRIVER)
    pointer, whole = ctypes.c_void_p, ctypes.c_uint
    driver.cuModuleLoadData.argtypes = (pointer, ctypes.c_char_p)
    driver.cuModuleGetFunction.argtypes = (pointer, pointer, ctypes.c_char_p)
    driver.cuFuncSetAttribute.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
    driver.cuLaunchKernel.argtypes = (pointer, *[whole] * 7, *[pointer] * 3)
    driver.cuGetErrorString.argtypes = (ctypes.c_int, pointer)
    return driver


def _ask(name: str, *arguments: Any) -> None:
    """Call the driver.

    Raises:
        DriverError: it refuses.
    """
    if code := getattr(_driver(), name)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        words = text.value.decode() if text.value else f"error {code}"
        raise DriverError(f"{name}: {words}")
