"""Tests that run once per instruction set of the native kernels."""

import pytest

from tinyllm.ops import cpu


def isa_fixture(*names):
    """Return a fixture that makes the kernels use each of these sets in turn, and names it."""

    @pytest.fixture(params=names)
    def isa(request, monkeypatch):
        native, reason = cpu.load()
        if native is None:
            pytest.skip(f"no native kernels here: {reason}")
        if not native.tinyllm_isa_supported(cpu.ISAS.index(request.param)):
            pytest.skip(f"this processor has no {request.param}")
        monkeypatch.setenv("TINYLLM_CPU_ISA", request.param)
        return request.param

    return isa
