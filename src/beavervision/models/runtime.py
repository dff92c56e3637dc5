"""Networks on ONNX Runtime: the CPU engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from beavervision.errors import ModelError

# ONNX Runtime's exceptions share no base of their own.
_FOREIGN: tuple[type[Exception], ...] = (
    *(e for e in vars(ort_errors).values() if isinstance(e, type) and issubclass(e, Exception)),
    RuntimeError,
    ValueError,
    OSError,
)


class OnnxNet:
    """A network in ONNX form (:class:`beavervision.media.Net`); safe to call from several threads.

    Args:
        model: the file, or its bytes.
        threads: CPU threads of one call.
        name: what to call it in errors.

    Raises:
        ModelError: it is no ONNX model, or a call fails (wrong shapes or kinds of inputs).
    """

    def __init__(self, model: bytes | Path, *, threads: int = 1, name: str = "model") -> None:
        self.name = name
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # A waiting thread sleeps: the cores are shared with decoder and encoder.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except _FOREIGN as error:
            raise ModelError(f"{name} is not a usable ONNX model: {error}. Import or install it again.") from error
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        if len(inputs) != len(self.inputs):
            raise ModelError(
                f"{self.name} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), not {len(inputs)}."
            )
        feed: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        try:
            return tuple(self._session.run(None, feed))
        except _FOREIGN as error:
            raise ModelError(f"{self.name} failed: {error}") from error
