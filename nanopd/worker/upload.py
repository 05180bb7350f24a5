"""Index arrays from the host to the device: one copy a call, through pinned memory that is used in turn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanopd.config import MAX_STEPS_IN_FLIGHT

CALLS_PER_STEP = 5
MIN_BYTES = 1 << 16


class Uploader:
    """Copies on torch's current stream and never waits for it.

    A buffer is used again after as many steps as may be in flight, and one more; by then the first of them has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        num_buffers = (MAX_STEPS_IN_FLIGHT + 1) * CALLS_PER_STEP
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * num_buffers
        self._next = 0

    def __call__(self, arrays: list[np.ndarray], out: Tensor | None = None) -> list[Tensor]:
        """Each of `arrays` (1-D int64) as a tensor on the device; in one run of memory, `out` if given."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        lengths = [len(array) for array in arrays]
        staging = self._staging(sum(lengths))
        np.concatenate(arrays, out=staging.numpy())
        on_device = torch.empty_like(staging, device=self._device) if out is None else out
        on_device.copy_(staging, non_blocking=True)
        return list(on_device.split(lengths))

    def _staging(self, length: int) -> Tensor:
        index, self._next = self._next, (self._next + 1) % len(self._buffers)
        if len(self._buffers[index]) < length:
            size = max(MIN_BYTES // 8, 1 << (length - 1).bit_length())
            self._buffers[index] = torch.empty(size, dtype=torch.int64, pin_memory=True)
        return self._buffers[index][:length]


def upload_once(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on the device, through pinned memory of its own, as for something rare or large; does not wait."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
