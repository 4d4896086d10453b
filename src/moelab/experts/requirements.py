"""What stands between a machine and the backends that need a GPU, in words; after a semicolon what mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil

import torch

NOTHING = "nothing mends that here"
CUDA_PYTORCH = "pip install --upgrade torch -i https://download.pytorch.org/whl/cu130"


def no_gpu(device: torch.device) -> str | None:
    """Why there is no GPU of compute capability 8.0 or more to run on; None if there is."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return None
        return f"needs compute capability 8.0 or more, and this GPU has {major}.{minor}; {NOTHING}"
    if torch.cuda.is_available():
        return f"needs a GPU, and this is on {device.type}; give --device cuda"
    if shutil.which("nvidia-smi") is None:
        return f"needs an NVIDIA GPU, and there is none; {NOTHING}"
    if torch.version.cuda is None:
        return f"needs a GPU, and this PyTorch is built without CUDA; {CUDA_PYTORCH}"
    return f"PyTorch for CUDA {torch.version.cuda} sees no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def no_triton() -> str | None:
    """Why Triton cannot be imported; None if it can."""
    if importlib.util.find_spec("triton") is not None:
        return None
    if platform.system() != "Linux":
        return f"there is no Triton for {platform.system()}; use Linux, which under Windows is WSL"
    return "Triton, which PyTorch's CUDA wheels bring, is not installed; pip install triton"


def interpreted(device: torch.device) -> bool:
    """Whether Triton's kernels are interpreted, on a CPU: right, for tests, and slow."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
