"""Each fault is put into a kernel, and some test of the kernel must fail: a test of the tests."""

import checks
import emulator
import kernel_mutants
import pytest
import test_adamw8bit_cuda as adamw
import test_cross_entropy_cuda as cross_entropy
import test_decode_attention as decode
import test_int8 as int8
import test_pointwise as pointwise
import test_rms_norm as rms_norm
import torch

pytestmark = pytest.mark.usefixtures("poisoned")

BF16, FP32 = torch.bfloat16, torch.float32
BY_TESTS = {
    "ROWS": [
        lambda seed: rms_norm.test_more_rows_than_teams((7, 2504), 3, seed, pytest.MonkeyPatch()),
        lambda seed: cross_entropy.test_equals_the_reference((2, 4104), BF16, seed),
    ],
    "RMS_NORM": [
        lambda seed: rms_norm.test_forward((5, 24), BF16, seed),
        lambda seed: rms_norm.test_small_numbers(seed),
        lambda seed: rms_norm.test_backward((6, 264), BF16, seed),
        lambda seed: rms_norm.test_backward((3, 2504), BF16, seed),
    ],
    "QUANTIZE": [
        lambda seed: int8.test_quantized_rows_equal_the_reference((6, 264), FP32, seed),
        lambda seed: int8.test_extreme_rows_equal_the_reference(64),
        lambda seed: int8.test_padding_is_zeros(),
        lambda seed: int8.test_dequantized_rows(FP32),
    ],
    "W8A16": [
        lambda seed: int8.test_w8a16(8, 96, 1084, BF16, seed),
        lambda seed: int8.test_w8a16(5, 31, 2048, BF16, seed),
    ],
    "W8A8": [
        lambda seed: int8.test_w8a8_equals_the_reference(130, 160, 72, BF16, seed),
        lambda seed: int8.test_w8a8_equals_the_reference(17, 129, 512, BF16, seed),
        lambda seed: int8.test_w8a8_has_no_bank_conflicts(),
    ],
    "DECODE": [
        lambda seed: decode.test_window(500, seed),
        lambda seed: decode.test_window(100, seed),
    ],
    "DECODE_INT8": [decode.test_int8_cache],
    "POINTWISE": [
        lambda seed: pointwise.test_rope((9, 6, 6, 64), BF16, seed),
        lambda seed: pointwise.test_swiglu((37, 64), BF16, seed),
        lambda seed: pointwise.test_rope_of_several_sequences_and_back(seed),
    ],
    "CROSS_ENTROPY": [
        lambda seed: cross_entropy.test_equals_the_reference((7, 72), BF16, seed),
    ],
    "ADAMW": [
        lambda seed: adamw.test_step_equals_the_definition_in_every_bit(1001, seed),
        lambda seed: adamw.test_every_number_gets_the_code_of_the_definition(True),
    ],
}
ALL = [(tests, mutant) for tests in BY_TESTS for mutant in getattr(kernel_mutants, tests)]


@pytest.mark.parametrize(("tests", "mutant"), ALL, ids=[f"{m.file}: {m.fault}" for _, m in ALL])
def test_a_fault_is_noticed(tests, mutant, monkeypatch):
    monkeypatch.setattr(checks, "edits", ((mutant.file, mutant.old, mutant.new),))
    for test in BY_TESTS[tests]:
        for seed in range(3):
            try:
                test(seed)
            except (emulator.EmulatorError, AssertionError) as error:
                if f"times {mutant.old!r}" not in str(error):
                    return
                raise
    pytest.fail("no shape and no order of the warps gives it away")


def test_every_list_of_faults_is_tried():
    lists = [name for name, value in vars(kernel_mutants).items() if isinstance(value, list)]
    assert sorted(lists) == sorted(BY_TESTS)
