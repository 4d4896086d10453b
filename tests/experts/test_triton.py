"""The Triton kernels without a GPU; on one, test_expert_mlp.py holds them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
def test_the_interpreted_kernels_are_right() -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    tests = Path(__file__).with_name("interpreted_triton.py")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:]
