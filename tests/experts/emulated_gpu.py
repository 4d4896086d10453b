"""Runs the launches of `moelab.experts.nvrtc` on a CPU: the same source, compiled by g++ with `emulated_gpu.h`."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from moelab.experts import nvrtc

ARGUMENTS = 14  # of a kernel, at most
HEADER = Path(__file__).with_name("emulated_gpu.h")


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
        *arguments: int,
        shared: int = 0,
    ) -> None:
        if 0 in grid:
            return
        library = self._libraries.get(source)
        if library is None:
            library = self._libraries[source] = self._built(source)
        two, given = ctypes.c_int * 2, ctypes.c_longlong * ARGUMENTS
        together = grid[0] if source.file == "route.cu" else 1
        stuck = library.run(getattr(library, name), two(*grid), two(*block), together, shared, given(*arguments))
        assert not stuck, f"{name}: threads wait at a barrier that others never reach"

    @contextlib.contextmanager
    def launches(self, device: torch.device) -> Iterator[EmulatedLaunch]:
        """For `nvrtc.launches`."""
        yield self

    def _built(self, source: nvrtc.Source) -> ctypes.CDLL:
        library = self.folder / f"{len(list(self.folder.iterdir()))}.so"
        code = (nvrtc.FOLDER / source.file).read_text()
        code = code.replace("extern __shared__ int shared[];", "int* shared = dynamic_shared();")
        macros = [f"-D{name}={value}" for name, value in source.definitions(self.arch)]
        subprocess.run(
            ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, "-x", "c++", "-", "-o", str(library)],
            input=f'#include "{HEADER}"\n{code}', text=True, check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(library))
