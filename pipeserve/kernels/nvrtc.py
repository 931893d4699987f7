"""CUDA C++ kernels: compiled at run time by NVRTC, loaded and launched through the driver.

Launched by the stage thread on torch's current stream, capturable in a CUDA graph. Both libraries
come with torch's CUDA build and are called through ctypes; cubins are kept in Triton's cache.
Constants: cuda.h and nvrtc.h of CUDA 13.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_FUNCTION_MAX_DYNAMIC_SHARED = 8
_LAUNCH_CLUSTER, _LAUNCH_EARLY = 4, 6
_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_TILED_TYPES = {torch.uint8: 0, torch.int32: 3, torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTE_TO_256_BYTES = 3
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


class CudaDriverError(RuntimeError):
    """The driver or NVRTC refused a call."""


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint),
        ("pad", ctypes.c_uint),
        ("value", ctypes.c_uint * 16),
    )


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def nvrtc_library() -> ctypes.CDLL | None:
    """NVRTC as torch has it, or as the wheels of NVIDIA lie in site-packages; None without it."""
    spec = find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [path for root in roots for path in glob.glob(f"{root}/*/lib/libnvrtc.so.*")]
    for name in (*_SONAMES, *sorted(path for path in found if ".alt." not in path)):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, call: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        raise CudaDriverError(f"{call} failed with status {status}: {reason}")


def compile_cubin(source: str, arch: str) -> bytes:
    """Machine code of CUDA C++ for an architecture such as sm_90a. Needs no GPU."""
    return compile_with_log(source, arch)[0]


def compile_with_log(source: str, arch: str) -> tuple[bytes, str]:
    """compile_cubin, and what the compiler says of it."""
    library = nvrtc_library()
    if library is None:
        raise CudaDriverError("NVRTC was not found: install the wheel nvidia-cuda-nvrtc")
    program = ctypes.c_void_p()
    names = (None, 0, None, None)
    status = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), *names)
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    if status == 0:
        status = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
    if status != 0:
        raise CudaDriverError(f"NVRTC failed with status {status}: {_log(library, program)}")
    size = ctypes.c_size_t()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    log = _log(library, program)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(max(1, size.value))
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


def cached_cubin(source: str, arch: str) -> bytes:
    """compile_cubin, once per source and architecture as long as Triton's cache directory lives."""
    from triton import knobs

    key = hashlib.sha256(f"{arch}\n{source}".encode()).hexdigest()
    path = Path(knobs.cache.dir) / f"nvrtc-{key}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = compile_cubin(source, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)
    return cubin


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaKernel:
    """A loaded kernel of one device."""

    handle: int
    shared_bytes: int
    """Dynamic shared memory of a block."""

    def launch(
        self, *, num_blocks: int, num_threads: int, cluster_size: int, stream: int,
        arguments: Sequence[
            ctypes.Array[ctypes.c_char] | ctypes.c_void_p | ctypes.c_int | ctypes.c_float
        ],
        starts_early: bool = False,
    ) -> None:  # fmt: skip
        """A line of blocks in clusters of cluster_size, which divides their number; 0 for cards
        without clusters. starts_early: as dependent_launch has it, whose rules the kernel keeps."""
        attributes = (_LaunchAttribute * 2)()
        num_attributes = 0
        if cluster_size:
            attributes[num_attributes].id = _LAUNCH_CLUSTER
            attributes[num_attributes].value[:3] = (cluster_size, 1, 1)
            num_attributes += 1
        if starts_early:
            attributes[num_attributes].id = _LAUNCH_EARLY
            attributes[num_attributes].value[0] = 1
            num_attributes += 1
        config = _LaunchConfig(
            grid=(num_blocks, 1, 1), block=(num_threads, 1, 1), shared_bytes=self.shared_bytes,
            stream=stream, attributes=attributes, num_attributes=num_attributes,
        )  # fmt: skip
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        function = ctypes.c_void_p(self.handle)
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), function, addresses, None)
        _check(status, "cuLaunchKernelEx")


def _enter_context(device: torch.device) -> None:
    """Make the device's primary context this thread's: torch does so only with its first call of
    the runtime, and not at all for device 0 by naming it."""
    number, context = ctypes.c_int(), ctypes.c_void_p()
    driver = _driver()
    assert device.index is not None, "whose context?"
    _check(driver.cuDeviceGet(ctypes.byref(number), device.index), "cuDeviceGet")
    status = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
    _check(status, "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def load_kernel(cubin: bytes, name: str, shared_bytes: int, *, device: torch.device) -> CudaKernel:
    """Onto the device, which must be torch's current one, for as long as the process lives."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver = _driver()
    _enter_context(device)
    _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
    status = driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
    _check(status, "cuModuleGetFunction")
    status = driver.cuFuncSetAttribute(function, _FUNCTION_MAX_DYNAMIC_SHARED, shared_bytes)
    _check(status, f"cuFuncSetAttribute to {shared_bytes} bytes of shared memory")
    assert function.value is not None
    return CudaKernel(handle=function.value, shared_bytes=shared_bytes)


def tensor_map(matrix: Tensor, *, box_rows: int, box_columns: int, swizzle: int) -> bytes:
    """What the copy engine is told of a matrix with rows of unit stride: see tiled_map."""
    assert matrix.stride(1) == 1, f"rows have stride {matrix.stride(1)}"
    return tiled_map(
        matrix.data_ptr(), matrix.dtype, (matrix.shape[1], matrix.shape[0]), (matrix.stride(0),),
        (box_columns, box_rows), swizzle,
    )  # fmt: skip


@cache
def _encoder() -> ctypes._NamedFuncPointer:
    function = _driver().cuTensorMapEncodeTiled
    integer, pointer = ctypes.c_uint, ctypes.c_void_p
    function.argtypes = (
        pointer, integer, integer, pointer, pointer, pointer, pointer, pointer,
        integer, integer, integer, integer,
    )  # fmt: skip
    return function


@lru_cache(maxsize=8192)
def tiled_map(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...],
    box: tuple[int, ...], swizzle: int,
) -> bytes:  # fmt: skip
    """A CUtensorMap, a pure function of its arguments; past the tensor's end reads as zeros.

    Dimensions from the innermost one out; strides, in elements, of all but that, whose stride is 1.
    The address and strides are multiples of 16 bytes. swizzle: bytes of a box's rows in which
    16-byte pieces are permuted, 0 for none.
    """
    buffer = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    start = -ctypes.addressof(buffer) % _MAP_ALIGNMENT
    rank = len(sizes)
    size_array = (ctypes.c_uint64 * rank)(*sizes)
    stride_array = (ctypes.c_uint64 * (rank - 1))(*(dtype.itemsize * stride for stride in strides))
    box_array, steps = (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank)
    status = _encoder()(
        ctypes.addressof(buffer) + start, _TILED_TYPES[dtype], rank, address, size_array,
        stride_array, box_array, steps, 0, _SWIZZLES[swizzle], _PROMOTE_TO_256_BYTES, 0,
    )  # fmt: skip
    _check(status, f"cuTensorMapEncodeTiled of {sizes}, strides {strides}, {dtype}, box {box}")
    return buffer.raw[start : start + _MAP_BYTES]
