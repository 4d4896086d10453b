"""Runs the launches of `moelab.experts.nvrtc` on a CPU: the same source, compiled by g++ with `emulated_gpu.h`."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moelab.experts import nvrtc

ARGUMENTS = 16  # of a kernel, at most
HERE = Path(__file__).parent
EMULATED = {"ptx.cuh": HERE / "emulated_gpu.h", "hopper.cuh": HERE / "emulated_hopper.h"}


class Map(ctypes.Structure):
    """What emulated_hopper.h takes for a `TensorMap`: a tensor (rows, columns) and boxes of some rows."""

    _fields_ = [("base", ctypes.c_longlong), ("columns", ctypes.c_int), ("rows", ctypes.c_int), ("box", ctypes.c_int)]


def _number(argument: int | Map) -> int:
    return ctypes.addressof(argument) if isinstance(argument, Map) else argument


class EmulatedLaunch:
    """Stands where `nvrtc.Launch` does, for tensors in the host's memory."""

    def __init__(self, folder: Path, arch: str) -> None:
        self.folder, self.arch = folder, arch
        self._libraries: dict[nvrtc.Source, ctypes.CDLL] = {}

    def __call__(
        self,
        source: nvrtc.Source,
        name: str,
        grid: tuple[int, int],
        block: tuple[int, int],
        *arguments: Any,
        shared: int = 0,
    ) -> None:
        if 0 in grid:
            return
        library = self._libraries.get(source)
        if library is None:
            library = self._libraries[source] = self._built(source)
        cluster = int(dict(source.definitions(self.arch))["BLOCKS"])
        together = {"route.cu": grid[0], "hopper.cu": cluster, "activated.cu": cluster}.get(source.file, 1)
        together = 1 if name == "sum_parts" else together
        two, given = ctypes.c_int * 2, (ctypes.c_longlong * ARGUMENTS)(*map(_number, arguments))
        stuck = library.run(getattr(library, name), two(*grid), two(*block), together, shared, given)
        assert not stuck, f"{name}: threads wait at a barrier that others never reach"

    def map(self, t: torch.Tensor, rows: int) -> Map:
        """For `nvrtc.Launch.map`; the accelerator takes multiples of 16 bytes alone."""
        assert t.data_ptr() % 16 == 0
        return Map(t.data_ptr(), t.shape[1], t.shape[0], rows)

    @contextlib.contextmanager
    def launches(self, device: torch.device) -> Iterator[EmulatedLaunch]:
        """For `nvrtc.launches`."""
        yield self

    def _built(self, source: nvrtc.Source) -> ctypes.CDLL:
        library = self.folder / f"{len(list(self.folder.iterdir()))}.so"
        names = [name for name in (*source.headers, source.file) if name not in EMULATED]
        code = "\n".join((nvrtc.FOLDER / name).read_text() for name in names)
        code = code.replace("extern __shared__ int shared[];", "int* shared = dynamic_shared();")
        macros = [f"-D{name}={value}" for name, value in source.definitions(self.arch)]
        subprocess.run(
            ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, "-x", "c++", "-", "-o", str(library)],
            input="".join(f'#include "{EMULATED[name]}"\n' for name in source.headers if name in EMULATED) + code,
            text=True, check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(library))
