"""Both bindings to CUDA on the simulated device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edgefg.artifact.plan import GpuInfo
from edgefg.errors import RuntimeUnavailableError
from edgefg.runtimes.cuda import Cuda, CudaError, describe_gpu, open_cuda
from tests.simulated.books import Books, Fault
from tests.simulated.install import simulated_device


@pytest.fixture(params=[False, True], ids=["cuda-python", "pycuda"])
def books(request: pytest.FixtureRequest) -> Iterator[Books]:
    with simulated_device(pycuda=request.param) as found:
        yield found
        found.assert_clean()


@pytest.fixture
def cuda(books: Books) -> Iterator[Cuda]:
    opened = open_cuda()
    yield opened
    opened.close()


def test_the_device_is_described(books: Books) -> None:
    device, free = describe_gpu()
    assert device == GpuInfo("Simulated Orin", "8.7", device.memory)
    assert 0 < free <= device.memory


def test_bytes_go_to_the_device_and_back(cuda: Cuda) -> None:
    with cuda.current():
        stream, memory = cuda.stream(), cuda.allocate(64)
        there, back = cuda.pinned(64), cuda.pinned(64)
        there[:] = np.arange(64)
        back[:] = 0
        cuda.copy_in(memory, there, stream)
        cuda.copy_out(back, memory, stream)
        cuda.synchronize(stream)
        np.testing.assert_array_equal(back, np.arange(64))
        for pinned in (there, back):
            cuda.free_pinned(pinned)
        cuda.free(memory)
        cuda.free_stream(stream)
        del stream  # PyCUDA frees it with its last reference


def test_a_failing_call_names_itself(books: Books) -> None:
    cuda = open_cuda()
    with cuda.current():
        books.faults.append(Fault("cudaMalloc", at=1, error=2))
        with pytest.raises(CudaError, match=r"(?i)memory"):
            cuda.free(cuda.allocate(1 << 20))
    cuda.close()


def test_a_gpu_that_is_not_there(books: Books) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"GPU 1 cannot be used: .*there are 1 GPUs, numbered from 0"):
        open_cuda(1)


def test_pycuda_says_that_it_has_no_graphs() -> None:
    with simulated_device(pycuda=True) as books:
        cuda = open_cuda()
        assert not cuda.graphs
        with pytest.raises(CudaError, match="install cuda-python"):
            cuda.capture(None, lambda: None)
        cuda.close()
        books.assert_clean()
