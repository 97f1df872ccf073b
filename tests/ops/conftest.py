import pytest
import torch


@pytest.fixture
def nan_memory():
    """Let torch fill new memory with NaN, integers with their largest number: a hole shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
