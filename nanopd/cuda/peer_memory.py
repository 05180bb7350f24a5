"""Memory of a GPU that another process allocated, mapped into this one (CUDA IPC).

The opening process maps it with its own device current: its kernels then reach memory of another GPU at link speed.
An open mapping keeps the memory allocated, and readable, even after the process that owned it has died.
"""

from __future__ import annotations

import ctypes
from typing import TypeAlias

from torch import Tensor

from nanopd.cuda.launch import CudaError

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1  # one of CUipcMem_flags

MemoryHandle: TypeAlias = tuple[bytes, int]  # the handle of a tensor's allocation, and the tensor's offset in it


class _Handle(ctypes.Structure):
    """A CUipcMemHandle, which the driver takes by value."""

    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


class PeerMemory:
    """An open mapping, which is closed when this object is collected."""

    def __init__(self, handle: MemoryHandle) -> None:
        """Opens the mapping for this thread's current device; the process must not be the one that exported it."""
        allocation, offset = handle
        self._base = ctypes.c_uint64()
        by_value = _Handle.from_buffer_copy(allocation)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(self._base), by_value, LAZY_ENABLE_PEER_ACCESS)
        self.address = self._base.value + offset

    def __del__(self) -> None:
        if self._base.value:
            ctypes.CDLL("libcuda.so.1").cuIpcCloseMemHandle(self._base)  # fails without harm as a process ends


def export_memory(tensor: Tensor) -> MemoryHandle:
    """The handle by which another process can open the memory of `tensor`.

    Raises:
        CudaError: the allocation is of a kind that cannot be shared, as torch's expandable segments are.
    """
    base, handle = ctypes.c_uint64(), _Handle()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), None, ctypes.c_uint64(tensor.data_ptr()))
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle.bytes), tensor.data_ptr() - base.value


def _call(function: str, *arguments: object) -> None:
    if error := getattr(ctypes.CDLL("libcuda.so.1"), function)(*arguments):
        raise CudaError(f"{function}: CUDA error {error}")
