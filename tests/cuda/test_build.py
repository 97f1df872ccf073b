"""Machine code for cards that are not here: NVRTC and nvcc need no GPU."""

import subprocess
import sys

import pytest

from tinyllm.ops import cuda_build
from tinyllm.ops.build import BuildError

ADD_ONE = """#include "shared.h"
struct Arguments { float* x; long long n; };
extern "C" __global__ void add(const __grid_constant__ Arguments p) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < p.n) p.x[i] = p.x[i] * p.x[i] + ONE;
}
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder of kernels with one source, and an empty cache."""
    sources = tmp_path / "kernels"
    sources.mkdir()
    (sources / "add.cu").write_text(ADD_ONE)
    (sources / "shared.h").write_text("#define ONE 1.0f\n")
    monkeypatch.setattr(cuda_build, "SOURCES", sources)
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    return sources


@pytest.fixture(params=["nvrtc", "nvcc"])
def compiler(request):
    """Each of the compilers that are here; NVRTC is part of the `dev` packages."""
    try:
        return getattr(cuda_build, request.param)()
    except BuildError as error:
        if request.param == "nvrtc":
            raise
        pytest.skip(str(error))


def compile_with(compiler, folder, architecture):
    return compiler.compile(folder / "add.cu", cuda_build.options("add.cu"), architecture)


def test_a_source_is_compiled_once(folder, monkeypatch):
    first = cuda_build.cubin("add.cu", (), "sm_86")
    assert first.read_bytes().startswith(b"\x7fELF")
    broken = cuda_build.Compiler(name=cuda_build.compiler().name, compile=pytest.fail)
    monkeypatch.setattr(cuda_build, "compiler", lambda: broken)
    assert cuda_build.cubin("add.cu", (), "sm_86") == first


@pytest.mark.parametrize(
    "changed", ["source", "header", "architecture", "macro", "exact", "compiler"]
)
def test_whatever_shapes_the_code_shapes_its_name(folder, monkeypatch, changed):
    first, architecture, defines = cuda_build.cubin("add.cu", (), "sm_86"), "sm_86", ()
    if changed == "source":
        (folder / "add.cu").write_text(ADD_ONE + "\n")
    elif changed == "header":
        (folder / "shared.h").write_text("#define ONE 2.0f\n")
    elif changed == "exact":
        monkeypatch.setattr(cuda_build, "EXACT", frozenset({"add.cu"}))
    elif changed == "compiler":
        other = cuda_build.Compiler(name="other", compile=cuda_build.compiler().compile)
        monkeypatch.setattr(cuda_build, "compiler", lambda: other)
    elif changed == "macro":
        defines = ("MORE=1",)
    else:
        architecture = "sm_90"
    assert cuda_build.cubin("add.cu", defines, architecture) != first


def test_exact_sources_round_twice(folder, monkeypatch, compiler):
    fused = compile_with(compiler, folder, "sm_86").cubin
    monkeypatch.setattr(cuda_build, "EXACT", frozenset({"add.cu"}))
    assert compile_with(compiler, folder, "sm_86").cubin != fused


def test_a_mistake_is_told_in_one_line(folder, compiler):
    (folder / "add.cu").write_text(ADD_ONE.replace("ONE", "TWO"))
    with pytest.raises(BuildError, match='identifier "TWO" is undefined') as error:
        compile_with(compiler, folder, "sm_86")
    assert "\n" not in str(error.value)


def test_an_unknown_architecture_is_told_in_one_line(folder, compiler):
    with pytest.raises(BuildError) as error:
        compile_with(compiler, folder, "sm_17")
    assert "\n" not in str(error.value)


def test_without_nvrtc_nvcc_compiles_and_without_both_none(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    cuda_build.compiler.cache_clear()
    with pytest.raises(BuildError, match="no NVRTC .*no nvcc"):
        cuda_build.compiler()
    fake = cuda_build.Compiler(name="nvcc", compile=pytest.fail)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: fake)
    assert cuda_build.compiler() is fake
    cuda_build.compiler.cache_clear()


def test_importing_looks_for_nothing():
    program = (
        "import sys, tinyllm.ops.registry, tinyllm.ops.cuda_driver;"
        "print('cuda.bindings.nvrtc' in sys.modules)"  # torch itself imports other parts
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
