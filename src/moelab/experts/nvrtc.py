"""CUDA C++ of this folder: compiled at first use by NVRTC, kept on disk, launched on PyTorch's current stream.

Everything comes from wheels, through `cuda.core`: no nvcc, no headers, no host compiler, nothing built at install.
Machine code is kept under $MOELAB_HOME/kernels, by the source, what it is compiled with and for, and the versions of
NVRTC and cuda-core; a file that is not what was written is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MEND = "pip install --upgrade 'moelab[cuda]'"
FOLDER = Path(__file__).parent
WITHOUT_ASKING = 48 * 1024  # bytes of dynamic shared memory


def no_compiler() -> str | None:
    """What stands in the way of compiling, with the command that mends it; None if nothing does. Needs no GPU."""
    for package in ("cuda-core", "cuda-bindings"):
        try:
            version(package)
        except PackageNotFoundError:
            return f"{package} is not installed; {MEND}"
    try:
        from cuda.bindings import nvrtc
        from cuda.core import LEGACY_DEFAULT_STREAM, Program, TensorMapDescriptor, launch  # noqa: F401
    except ImportError as problem:
        return f"cuda-core {version('cuda-core')} cannot be used ({problem}); {MEND}"
    try:
        nvrtc.nvrtcVersion()
    except Exception as problem:  # cuda-pathfinder has classes of its own for a library that is not found
        return f"NVRTC cannot be loaded ({str(problem).splitlines()[0]}); {MEND}"
    return None


def old_driver() -> str | None:
    """Why this machine's driver does not load what the compiler makes; None if it does."""
    from cuda.bindings import driver, nvrtc

    (_, major, minor), (_, known) = nvrtc.nvrtcVersion(), driver.cuDriverGetVersion()
    if known >= 1000 * major:
        return None
    return (
        f"NVRTC {major}.{minor} makes code that this driver, of CUDA {known // 1000}.{known % 1000 // 10}, does not"
        " load; update the driver to 580 or later"
    )


class Source:
    """A file of device code with headers before it, and the macros that it is compiled with.

    Args:
        file: in this folder.
        macros: names and values.
        headers: that stand before it.
        feature: letter of the instructions that only one architecture has, as the "a" of sm_90a.
        blocks: of a cluster; `cluster_blocks` when not given.
    """

    def __init__(
        self, file: str, *macros: tuple[str, int], headers: tuple[str, ...] = ("ptx.cuh", "curve.cuh", "lines.cuh"),
        feature: str = "", blocks: int | None = None,
    ) -> None:  # fmt: skip
        self.file, self.macros, self.headers, self.feature, self.blocks = file, macros, headers, feature, blocks
        self._modules: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Any] = {}
        self._cubins: dict[str, bytes] = {}  # for where nothing can be written

    def text(self) -> str:
        """What the compiler reads; messages name lines of the files."""
        return "\n".join(f'#line 1 "{name}"\n{(FOLDER / name).read_text()}' for name in (*self.headers, self.file))

    def definitions(self, arch: str) -> list[tuple[str, str]]:
        """All macros for an architecture such as sm_90."""
        blocks = cluster_blocks(arch) if self.blocks is None else self.blocks
        return [(name, str(value)) for name, value in (*self.macros, ("BLOCKS", blocks))]

    def compile(self, arch: str) -> bytes:
        """Machine code for an architecture. Needs no GPU."""
        from cuda.core import Program, ProgramOptions

        options = ProgramOptions(arch=arch + self.feature, std="c++17", define_macro=self.definitions(arch))
        return bytes(Program(self.text(), "c++", options).compile("cubin").code)

    def cubin(self, arch: str) -> bytes:
        """`compile`, from disk where it was done before."""
        if arch in self._cubins:
            return self._cubins[arch]
        from cuda.bindings import nvrtc

        from moelab.config import moelab_home

        versions = nvrtc.nvrtcVersion()[1:], version("cuda-core")
        facts = (self.text(), self.definitions(arch), arch + self.feature, versions)
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        path = moelab_home() / "kernels" / f"{Path(self.file).stem}-{arch}-{key}.cubin"
        kept = _read(path)
        if kept is None:
            kept = self.compile(arch)
            _write(path, kept)
        self._cubins[arch] = kept
        return kept

    def kernel(self, name: str, arch: str) -> Any:
        """A `cuda.core.Kernel`; it belongs to no context and serves every device of the architecture."""
        found = self._kernels.get((name, arch))
        if found is None:
            if arch not in self._modules:
                from cuda.core import ObjectCode

                self._modules[arch] = ObjectCode.from_cubin(self.cubin(arch), name=self.file)
            found = self._kernels[name, arch] = self._modules[arch].get_kernel(name)
        return found


def cluster_blocks(arch: str) -> int:
    """Thread blocks of a cluster, which compute capability 9.0 brought: the most that every GPU with them has."""
    return 8 if int(arch.removeprefix("sm_")) >= 90 else 1


def _read(path: Path) -> bytes | None:
    """What `_write` wrote; None if that is not what stands there."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """In one step, after its own digest. Where nothing can be written, every process compiles."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(aside, path)
        except OSError:
            os.unlink(aside)
            raise


class Launch:
    """Launches on the stream that was PyTorch's current one, on a device, when this was made."""

    def __init__(self, device: torch.device) -> None:
        from cuda.core import launch

        self._launch, self._device = launch, device.index or 0
        self.arch = "sm_{}{}".format(*_capability(device))
        self._stream = _stream(torch.cuda.current_stream(device).cuda_stream)

    def __call__(
        self, source: Source, name: str, grid: tuple[int, int], block: tuple[int, int], *arguments: Any, shared: int = 0
    ) -> None:
        """Arguments are addresses, 64-bit integers and maps; shared in bytes. An empty grid launches nothing."""
        if 0 not in grid:
            kernel = source.kernel(name, self.arch)
            if shared > WITHOUT_ASKING:
                _allow(kernel, shared, self._device)
            self._launch(self._stream, _shape(grid, block, shared), kernel, *arguments)

    def map(self, t: torch.Tensor, rows: int) -> Any:
        """How the tensor memory accelerator finds boxes of `rows` rows by 64 columns in t (R, C), 16 bits an element.

        A row of a box has 128 bytes, swizzled by 128.
        """
        return _map(t.data_ptr(), tuple(t.shape), rows, self._device)


class _Place:
    """An address and a shape of 16-bit numbers, as the CUDA array interface says it; it owns nothing."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "<u2", "data": (address, False), "strides": None, "stream": None, "version": 3,
        }  # fmt: skip


@functools.lru_cache(maxsize=4096)  # PyTorch gives a step's tensors the same addresses again and again
def _map(address: int, shape: tuple[int, ...], rows: int, device: int) -> Any:
    from cuda.core._tensor_map import TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    return StridedMemoryView.from_any_interface(_Place(address, shape), stream_ptr=-1).as_tensor_map(
        box_dim=(rows, 64), swizzle=TensorMapSwizzle.SWIZZLE_128B, l2_promotion=TensorMapL2Promotion.L2_128B
    )


@contextlib.contextmanager
def launches(device: torch.device) -> Iterator[Launch]:
    """A `Launch`, with the device current."""
    with torch.cuda.device(device):
        _make_current(torch.cuda.current_device())
        yield Launch(device)


_threads = threading.local()


def _make_current(device: int) -> None:
    """Once a thread: PyTorch's threads, autograd's among them, have no context before the runtime first needs one."""
    ready: set[int] = _threads.__dict__.setdefault("ready", set())
    if device not in ready:
        from cuda.core import Device

        Device(device).set_current()
        ready.add(device)


@functools.cache
def _allow(kernel: Any, shared: int, device: int) -> None:
    """Lets a kernel have more shared memory than it has without asking."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, driver.CUdevice(device))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{shared} bytes of shared memory: {status.name}")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _stream(handle: int) -> Any:
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM


@functools.lru_cache(maxsize=1024)
def _shape(grid: tuple[int, int], block: tuple[int, int], shared: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block, shmem_size=shared)
