"""How busy GPUs are, as their driver tells: a metric for each CUDA device in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beavervision import metrics


class GpuWatch:
    """Measures the utilisation of `devices` (``cuda:<index>``); of none where nvidia-ml-py or the driver is missing."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._handles: dict[str, Any] = {}
        wanted = [device for device in dict.fromkeys(devices) if device.startswith("cuda:")]
        if not wanted:
            return
        try:
            import pynvml
            import torch  # an extra: not part of the default install

            pynvml.nvmlInit()
        except Exception:  # the library's own errors cannot be named where it is missing
            return
        self._nvml: Any = pynvml
        for device in wanted:
            uuid = torch.cuda.get_device_properties(device).uuid  # the driver counts GPUs that torch may not see
            try:
                self._handles[device] = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            except pynvml.NVMLError:
                continue

    def measure(self) -> None:
        """Set the metric; a device that does not answer keeps its last value."""
        for device, handle in self._handles.items():
            try:
                percent = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            except self._nvml.NVMLError:
                continue
            metrics.DEVICE_UTILISATION.labels(device).set(percent / 100)
