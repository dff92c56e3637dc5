"""Networks on PyTorch: the CUDA engine. PyTorch is imported when a network is made, never before."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from beavervision.errors import DeviceError, ModelError

if TYPE_CHECKING:
    import torch

INSTALL_TORCH = "It needs PyTorch: pip install 'beavervision[gpu]'"


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured CUDA graph for one batch size, with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


class TorchNet:
    """A PyTorch module as a :class:`beavervision.media.Net`; safe to call from several threads.

    On CUDA it computes in half precision, and a batch is filled up to the next of `batch_sizes`, each of which has a
    CUDA graph made at its first use; larger batches run in several calls. On the CPU it computes in single precision.

    Args:
        module: takes and returns tensors whose first axis is the batch; moved to `device`.
        device: ``"cpu"`` or ``"cuda:N"``.
        threads: CPU threads, of the whole process (a limit of PyTorch); used on the CPU only.
        batch_sizes: the batches to make CUDA graphs for.
        half: False keeps single precision on CUDA too, for networks whose values half precision cannot hold.
        name: what to call it in errors.

    Raises:
        DeviceError: the device is not there, or its memory does not suffice.
        ModelError: PyTorch is not installed, or a call fails.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        device: str = "cpu",
        threads: int = 1,
        batch_sizes: Iterable[int] = (1, 2, 4, 8, 16),
        half: bool = True,
        name: str = "model",
    ) -> None:
        self.name = name
        try:
            import torch
        except ImportError as error:
            raise ModelError(f"{name} cannot run on {device}. {INSTALL_TORCH}") from error
        self._torch = torch
        self._lock = threading.Lock()
        self._graphs: dict[tuple[int, ...], _Graph] = {}  # by the shapes of the inputs, the batch's size first
        try:
            self._device = torch.device(device)
            self._cuda = self._device.type == "cuda"
            if not self._cuda:
                torch.set_num_threads(threads)
            self._half = half and self._cuda
            self._module = module.eval().to(self._device, torch.float16 if self._half else torch.float32)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"{name} cannot be put on {device}: {error}. Choose another device.") from error
        self._batch_sizes = tuple(sorted(batch_sizes)) if self._cuda else ()

    def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        torch = self._torch
        try:
            with self._lock, torch.inference_mode():
                if not self._batch_sizes:
                    outputs = self._module(*(self._tensor(array) for array in inputs))
                    return tuple(self._array(tensor) for tensor in _tuple(outputs))
                largest = self._batch_sizes[-1]
                parts = [
                    self._replay(tuple(array[at : at + largest] for array in inputs))
                    for at in range(0, len(inputs[0]), largest)
                ]
                return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.name} ran out of memory on {self._device}. Use a smaller batch or another device."
            ) from error
        except (RuntimeError, TypeError) as error:
            raise ModelError(f"{self.name} failed: {error}") from error

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        return tensor.half() if self._half and tensor.is_floating_point() else tensor

    def _array(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        return array

    def _replay(self, arrays: tuple[npt.NDArray[np.generic], ...]) -> tuple[npt.NDArray[Any], ...]:
        count = len(arrays[0])
        size = next(s for s in self._batch_sizes if s >= count)
        tensors = tuple(self._tensor(array) for array in arrays)
        key = (size, *(n for t in tensors for n in t.shape[1:]))
        if key not in self._graphs:
            self._graphs[key] = self._captured(tensors, size)
        captured = self._graphs[key]
        for slot, tensor in zip(captured.inputs, tensors, strict=True):
            slot[:count].copy_(tensor)
        captured.graph.replay()
        return tuple(self._array(tensor[:count]) for tensor in captured.outputs)

    def _captured(self, like: tuple[torch.Tensor, ...], size: int) -> _Graph:
        torch = self._torch
        slots = tuple(t.new_zeros((size, *t.shape[1:])) for t in like)
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a graph may be captured only after the libraries have chosen their kernels
                for _ in range(3):
                    self._module(*slots)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = _tuple(self._module(*slots))
        return _Graph(graph, slots, outputs)


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
