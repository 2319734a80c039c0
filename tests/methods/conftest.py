import numba
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Threads only get in each other's way on matrices this small."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])
