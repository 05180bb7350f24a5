"""Compiles kernels with numba, keeps the machine code on disk, and launches it through the driver.

numba's dispatcher takes 40 us and more per launch, and its disk cache misses edits in other files. So numba compiles
to PTX, nvJitLink assembles, the cubin is kept under a hash of everything that went into it, and a launch is one
`cuLaunchKernelEx` with arguments packed into a fixed buffer. Launches go to torch's current stream, so that they are
captured into torch's CUDA graphs. Knows no kernel. A `Kernel` belongs to one device and one thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ENTRY = "kernel"  # instead of numba's mangled names, which would make file names a part of the cubin
COMPILERS = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvrtc")
SIGNATURE = {"r": "int32", "l": "int64", "f": "float32"}
STATIC_SHARED_BYTES = 48 * 1024  # a kernel has to ask for more shared memory than this
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # a CUfunction_attribute
PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # a CUfunction_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # a CUlaunchAttributeID

Capability = tuple[int, int]


@dataclass(frozen=True)
class Spec:
    """A kernel to be compiled: `factory(*parameters)` returns it as a Python function."""

    factory: Callable[..., Callable[..., None]]
    parameters: tuple[int | str, ...]
    arguments: str  # a letter each: r int32, l int64 (and addresses), f float32
    threads: int
    shared_bytes: int = 0
    shared_percent: int = 100  # the part of a multiprocessor's L1 that should be shared memory, as far as it can be

    @property
    def name(self) -> str:
        return "_".join([self.factory.__name__, *map(str, self.parameters)])


class CudaError(RuntimeError):
    """The driver refused a call."""


def compile_to_ptx(spec: Spec, capability: Capability) -> str:
    """The PTX of a kernel. Compiling needs numba-cuda and its libraries, but no GPU."""
    from numba import cuda
    from numba.cuda import types

    with _toolkit():
        ptx, _ = cuda.compile_ptx(
            spec.factory(*spec.parameters),
            tuple(getattr(types, SIGNATURE[letter]) for letter in spec.arguments),
            cc=capability,
            fastmath=True,
            launch_bounds=(spec.threads, 1),
        )
    mangled = re.search(r"\.entry (\w+)\(", ptx)
    assert mangled
    ptx = str(ptx).replace(mangled[1], ENTRY)
    # Devices without programmatic dependent launch start a kernel when its predecessor is done: it need not wait.
    return ptx if capability >= (9, 0) else re.sub(r"griddepcontrol\.\w+;", "", ptx)


def assemble(ptx: str, capability: Capability) -> tuple[bytes, str]:
    """The machine code, and the assembler's report of registers and spills."""
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-Xptxas=-v", "-verbose"]
    linker = nvjitlink.create(len(options), options)
    try:
        source = ptx.encode()
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, source, len(source), ENTRY)
        nvjitlink.complete(linker)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, cubin)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        if log:
            nvjitlink.get_info_log(linker, log)
    finally:
        nvjitlink.destroy(linker)
    return bytes(cubin), log.decode(errors="replace").rstrip("\0")


def load_or_compile(spec: Spec, capability: Capability, directory: Path) -> bytes:
    """The cubin from `directory`; a new one is compiled and put there if it is missing."""
    path = directory / f"{spec.name}-{_fingerprint(spec, capability)}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin, _ = assemble(compile_to_ptx(spec, capability), capability)
    directory.mkdir(parents=True, exist_ok=True)
    # Several workers may compile the same kernel: each writes a file of its own, and the last one stays.
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)
    return cubin


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanopd" / "kernels"


def _fingerprint(spec: Spec, capability: Capability) -> str:
    """A hash of the kernels' sources (all of this package), the compilers, the device and the options."""
    described = [spec.name, spec.arguments, spec.threads, capability, _compilers(), _sources()]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:20]


@functools.cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _compilers() -> tuple[tuple[str, str], ...]:
    installed = {(d.name or "").lower(): d.version for d in metadata.distributions()}
    return tuple((name, installed.get(name, "")) for name in COMPILERS)


@contextmanager
def _toolkit() -> Iterator[None]:
    """Names the usual place in CUDA_HOME meanwhile, where numba looks for libnvvm if no pip package has it."""
    is_missing = "CUDA_HOME" not in os.environ and Path("/usr/local/cuda").is_dir()
    if is_missing:
        os.environ["CUDA_HOME"] = "/usr/local/cuda"
    try:
        yield
    finally:
        if is_missing:
            del os.environ["CUDA_HOME"]


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint64 * 8))


class _LaunchConfig(ctypes.Structure):
    """The CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((f"{of}_{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernel:
    """A kernel that is loaded on a device: `kernel(num_ctas, *arguments)` launches it.

    Arguments are Python numbers; a tensor is passed as its `data_ptr()`, and whoever launches keeps it alive. Load and
    launch once before a graph is captured. With `overlap`, the kernel may start while its predecessor in the stream
    still runs (programmatic dependent launch); it waits by itself before it reads or writes what the predecessor may
    have written, except for what its launcher says must be older.
    """

    def __init__(self, spec: Spec, device: int) -> None:
        import torch

        self.spec = spec
        self._driver = _driver()
        self._stream = functools.partial(torch._C._cuda_getCurrentRawStream, device)
        self._function = self._load(device)
        formats = [{"r": "i", "l": "q", "f": "f"}[letter] for letter in spec.arguments]
        self._layout = struct.Struct("@" + "".join(formats))
        self._arguments = ctypes.create_string_buffer(self._layout.size)
        self._config = _LaunchConfig(1, 1, 1, spec.threads, 1, 1, spec.shared_bytes)
        self._attribute = _LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self._config.attributes = ctypes.pointer(self._attribute)
        ends = [struct.calcsize("@" + "".join(formats[: i + 1])) for i in range(len(formats))]
        begins = [end - struct.calcsize(letter) for end, letter in zip(ends, formats)]
        address = ctypes.addressof(self._arguments)
        pointers = (ctypes.c_void_p * len(begins))(*[address + begin for begin in begins])
        self._call = functools.partial(
            self._driver.cuLaunchKernelEx, ctypes.byref(self._config), self._function, pointers, None
        )

    def __call__(self, num_ctas: int, *arguments: int | float, overlap: bool = False) -> None:
        self._layout.pack_into(self._arguments, 0, *arguments)
        self._config.grid_x = num_ctas
        self._config.stream = self._stream()
        self._config.num_attributes = overlap
        if error := self._call():
            raise CudaError(f"launch of {self.spec.name} on {num_ctas} CTAs: CUDA error {error}")

    def _load(self, device: int) -> ctypes.c_void_p:
        import torch

        torch.cuda.init()
        capability = torch.cuda.get_device_capability(device)
        cubin = load_or_compile(self.spec, capability, cache_directory())
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # this makes the device's context current in this thread
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), module, ENTRY.encode()))
        if self.spec.shared_bytes > STATIC_SHARED_BYTES:
            size = self.spec.shared_bytes
            self._check(self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, size))
        percent = self.spec.shared_percent
        self._check(self._driver.cuFuncSetAttribute(function, PREFERRED_SHARED_MEMORY_CARVEOUT, percent))
        return function

    def _check(self, error: int) -> None:
        if error:
            raise CudaError(f"loading of {self.spec.name}: CUDA error {error}")


@functools.cache
def kernel_of(make_spec: Callable[..., Spec], device: int, *parameters: int | str) -> Kernel:
    """The kernel of `make_spec(*parameters)` on a device, compiled and loaded at its first use."""
    return Kernel(make_spec(*parameters), device)


def address_of(tensor: Any) -> int:
    """The address of a tensor, or 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
