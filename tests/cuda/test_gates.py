"""Every CUDA kernel for every card, without one: it compiles, fits, spills nothing.

Kernels, blocks and shared memory come from the recorded launches of the host sides.
"""

import re

import cuda_gates
import pytest
from cuda_launches import FORMATS, launches

from tinyllm.ops import cuda_build
from tinyllm.ops.build import BuildError

TENSOR_CORES = {"HMMA", "LDSM", "LDGSTS.128"}
MEANT = {
    "attention_forward": TENSOR_CORES,
    "attention_forward_hopper": {"HGMMA", "UTMALDG"},
    "attention_backward_queries": TENSOR_CORES,
    "attention_backward_keys": TENSOR_CORES,
    "rms_norm_forward": {"LDG.128", "STG.128"},
    "rms_norm_backward": {"LDG.128", "STG.128"},
    "rms_norm_weight": {"LDG.128"},
    "quantize_rows": {"LDG.128"},
    "dequantize_rows": {"LDG.128", "STG.128"},
    "linear_w8a8": {"IMMA", "LDGSTS.128"},
    "linear_w8a16": {"HMMA", "LDG.128"},
    "decode_attention": {"LDG.128"},
    "decode_attention_combine": set(),
    "rope": {"LDG.128", "STG.128"},
    "swiglu_forward": {"LDG.128", "STG.128"},
    "swiglu_backward": {"LDG.128", "STG.128"},
    "cross_entropy": {"LDG.128", "STG.128"},
    "adamw8bit": {"LDG.128", "STG.128"},
}
"""What a kernel is built around; without it, it would still be right, and slow."""
SHIPPED = ((64, 64), (128, 128))
"""Heads that every run looks at."""


def faults_of(compiler, recorded, architecture):
    """Return everything that is wrong, by kernel."""
    found = {}
    by_program = cuda_gates.programs(recorded)
    wanted = [(program, architecture) for program in by_program]
    for (program, _), kernels in cuda_gates.inspect_all(compiler, wanted).items():
        for entry, of_entry in by_program[program].items():
            wrong = cuda_gates.faults(kernels[entry], of_entry, architecture)
            # of a cache in INT8 a lane reads 8 bytes, as many numbers as 16 bytes of bf16
            meant = MEANT[entry] - ({"LDG.128"} if "CACHE=i8" in program[1] else set())
            wrong += [f"no {kind}" for kind in meant if not kernels[entry].instructions.get(kind)]
            if wrong:
                found[entry, program[1]] = wrong
    return found


@pytest.mark.parametrize("architecture", cuda_build.ARCHITECTURES)
def test_every_kernel_fits_every_card(architecture):
    recorded = launches(architecture, FORMATS[:1], SHIPPED)
    assert faults_of(cuda_build.nvrtc(), recorded, architecture) == {}


@pytest.mark.slow  # about a minute per compiler
@pytest.mark.parametrize("name", ["nvrtc", "nvcc"])
@pytest.mark.parametrize("architecture", cuda_build.ARCHITECTURES)
def test_every_format_and_width_fits_every_card(name, architecture):
    try:
        compiler = getattr(cuda_build, name)()
    except BuildError as error:
        pytest.skip(str(error))
    assert faults_of(compiler, launches(architecture), architecture) == {}


def test_no_kernel_is_left_out():
    written = {
        name
        for source in cuda_build.sources()
        for name in re.findall(r"^KERNEL\((\w+),", (cuda_build.SOURCES / source).read_text(), re.M)
    }
    recorded = [
        launch for name in ("sm_86", "sm_90") for launch in launches(name, FORMATS[:1], SHIPPED)
    ]
    assert {launch.entry for launch in recorded} == written == set(MEANT)
    assert {launch.source for launch in recorded} == set(cuda_build.sources())


SPILLING = """
struct Arguments { float* x; };
extern "C" __global__ void __launch_bounds__(1024) spill(const __grid_constant__ Arguments p) {
  float held[200];
#pragma unroll
  for (int i = 0; i < 200; i++) held[i] = p.x[i * 7919 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; i++) p.x[i * 7919 + threadIdx.x] = held[i] * held[199 - i];
}
"""


def test_a_kernel_that_spills_is_caught(monkeypatch, tmp_path):
    (tmp_path / "spill.cu").write_text(SPILLING)
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path)
    kernel = cuda_gates.inspect(cuda_build.nvrtc(), ("spill.cu", ()), "sm_86")["spill"]
    wrong = " ".join(cuda_gates.faults(kernel, [], "sm_86"))
    assert "spills" in wrong
    assert "local memory" in wrong


def test_wgmma_that_wait_for_each_other_are_caught():
    """With another warpgroup a thread has too few registers."""
    (launch,) = [each for each in launches("sm_90", FORMATS[:1], SHIPPED[1:]) if each.tensors]
    defines = tuple(each.replace("WARPGROUPS=2", "WARPGROUPS=3") for each in launch.defines)
    kernels = cuda_gates.inspect(cuda_build.nvrtc(), (launch.source, defines), "sm_90")
    wrong = cuda_gates.faults(kernels[launch.entry], [launch], "sm_90")
    assert "its wgmma wait for each other" in wrong


@pytest.mark.parametrize(
    ("architecture", "fits"), [("sm_80", True), ("sm_86", False), ("sm_90", True)]
)
def test_shared_memory_is_held_to_the_card(architecture, fits):
    (launch, *_) = launches("sm_86", FORMATS[:1], SHIPPED)
    greedy = type(launch)(
        **{name: getattr(launch, name) for name in ("source", "entry", "grid", "block")},
        shared_bytes=100 * 1024,
        arguments=launch.arguments,
    )
    kernel = cuda_gates.Kernel(registers=64, spill_bytes=0, static_shared_bytes=0, instructions={})
    assert (cuda_gates.faults(kernel, [greedy], architecture) == []) is fits
    many = cuda_gates.Kernel(registers=250, spill_bytes=0, static_shared_bytes=0, instructions={})
    wide = type(launch)(
        **{name: getattr(launch, name) for name in ("source", "entry", "grid")},
        block=(512, 1, 1),
        shared_bytes=0,
        arguments=launch.arguments,
    )
    assert "for 512 threads" in cuda_gates.faults(many, [wide], architecture)[0]
