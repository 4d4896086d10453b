"""The device at hand: which one a run uses, the arithmetic it is good at, its peak, and how full its memory got."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from moelab.config import Precision, UsageError, moelab_home, uncollected

# Dense bf16 (or fp16) matrix peak in FLOP/s, without sparsity, from the vendors' data sheets. The first name that the
# device's own name contains decides, so the longer names of one family come first.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GB200", 2500e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("T4", 65e12),
    ("V100", 125e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names, made PyTorch's current one; raises `UsageError` if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device = {name}: give auto, cpu, mps, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"device = {name}: PyTorch sees {count} CUDA devices here; give auto or cpu")
        torch.cuda.set_device(device.index or 0)  # where kernels that are launched without a tensor's guard run
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device = {name}: not available here; give auto or cpu")
    if device.type not in ("cpu", "mps"):
        raise UsageError(f"device = {name}: give auto, cpu, mps, cuda or cuda:N")
    return device


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the products. Raises `UsageError` for fp16 without a GPU, which has no loss scaling to offer there.

    On CPUs `auto` is bf16 where the processor multiplies it in hardware; on two EPYC cores with AVX512-BF16 a
    2048 × 128 × 512 product ran at 738 GFLOP/s in bf16 and 49 to 176 in fp32 (PyTorch 2.13). Elsewhere it is emulated.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
    if precision == "fp16" and device.type != "cuda":
        raise UsageError(f"precision = fp16: needs a CUDA device, and this run is on {device.type}; give bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UsageError(f"precision = bf16: {name} has no bf16 units; give fp16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware, as far as PyTorch says, or Linux before PyTorch 2.12."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    capabilities = ask() if ask else dict.fromkeys((_cpu_fact("flags") or "").split(), True)
    return any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16"))


def device_name(device: torch.device) -> str:
    """What a report calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = _cpu_fact("model name") or platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def _cpu_fact(name: str) -> str | None:
    """What Linux says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak of the device's matrix units in FLOP/s for bf16 or fp16, as its data sheet states; None where unknown."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS if known in name), None)


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the largest memory use so far, so that `peak_memory` speaks of what comes after."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on CUDA the most that PyTorch had allocated, on Linux CPUs the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu":
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return None
    return None


CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # v2, v1


def available_memory(device: torch.device) -> int | None:
    """Bytes that a run can allocate: on CUDA what is free, and what PyTorch holds of it already without using it; on
    Linux CPUs what the kernel deems available, and a container's limit leaves; None where it is not known."""
    if device.type == "cuda":
        gc.collect()  # an earlier run's tensors may be in cycles
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return None
        return min([free, *_left_to_a_container()])
    return None


def _left_to_a_container() -> list[int]:
    """Bytes under each limit that this process's control group has; the files it may have read count as used."""
    left = []
    for limit, usage in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            left.append(int((CGROUP / limit).read_text()) - int((CGROUP / usage).read_text()))
    return left


def keep_freed_memory() -> None:
    """Asks glibc to keep the memory of freed tensors, for this process.

    It hands large blocks back to the kernel, which clears their pages at each use again: with this, a smoke step of the
    dense arm takes 57 ms instead of 117 on two EPYC cores. Does nothing under another C library.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(mmap_threshold, 1 << 30)
        c_library.mallopt(trim_threshold, (1 << 31) - 1)
        c_library.mallopt(top_pad, 64 << 20)


def keep_compiled_code() -> None:
    """Has torch.compile and Triton keep what they compile under MOELAB_HOME, for this process and those it starts.

    Folders that the user names, in the variables of those two, are left. `compiled` has a folder for each state of our
    operators: PyTorch finds a compiled graph again by its operators' names, without their gradients' formulas.
    """
    here = Path(__file__).resolve().parent
    source = hashlib.sha256()
    for file in sorted(file for folder in ("experts", "model") for file in (here / folder).glob("*.py")):
        source.update(file.read_bytes())
    folder = moelab_home() / "compiled" / source.hexdigest()[:16]
    with contextlib.suppress(OSError):  # where nothing can be written the compilers keep to their own folders
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
                os.environ.setdefault(variable, str(folder / name))
    settings, ours_too = (
        importlib.import_module("torch._functorch.config"),
        "autograd_cache_allow_custom_autograd_functions",
    )
    if hasattr(settings, ours_too):  # or a graph with an autograd function is traced again at each start
        setattr(settings, ours_too, True)


def import_compiler() -> None:
    """Imports what the first `torch.compile` would: some 1,500 modules."""
    with uncollected():
        importlib.import_module("torch._inductor.compile_fx")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int | float | None]:
    """What a result was measured on: versions, commit, device and driver."""
    facts: dict[str, str | int | float | None] = {
        "moelab": _version("moelab"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "platform": f"{platform.system()} {platform.machine()}, {'-'.join(platform.libc_ver())}".rstrip(", -"),
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "device_peak_flops": peak_flops(device, dtype),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "triton": _version("triton"), "driver": _driver()}
        packages = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "megablocks", "stanford-stk")
        facts |= {name.replace("-", "_"): found for name in packages if (found := _version(name)) is not None}
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output_of(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _driver() -> str | None:
    lines = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, marked where files differ from it."""
    here = Path(__file__).resolve().parent
    if _output_of("git", "ls-files", "--error-unmatch", __file__, cwd=here) is None:
        return None
    return _output_of("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", cwd=here)
