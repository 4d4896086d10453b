"""The Triton kernels without a GPU: interpreted, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import UsageError
from moelab.experts import triton as backend
from moelab.experts.activation import inner_size
from moelab.experts.choice import Shape
from moelab.model import fused_router, head
from moelab.training import optimizer

TESTS = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@pytest.mark.parametrize(
    "file",
    [
        "experts/interpreted_triton.py", "model/interpreted_router.py", "model/interpreted_head.py",
        "model/interpreted_linear.py",
        "training/test_optimizer.py",
    ],
)  # fmt: skip
def test_the_interpreted_kernels_are_right(file: str) -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
    done = subprocess.run(
        run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_more_experts_than_the_sort_has_bins_for_are_refused_in_one_line() -> None:
    refused = backend.refuses_shape(Shape(64, 64, 8192, 2))
    assert refused == "experts = 8192: the backend triton takes 8191; give another --backend"
    assert backend.refuses_shape(Shape(64, 64, 8191, 2)) is None


def test_more_slots_than_the_sort_numbers_are_refused_in_one_line() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    slots = torch.zeros(1, dtype=torch.int64).expand(2**31 - 2**15 + 1, 1)  # of one element
    with pytest.raises(UsageError) as said:
        backend.sort_slots(slots, 8)
    assert str(said.value) == "slots = 2147450881: the backend triton takes 2147450880; give fewer tokens a step"


TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes that a program can have


def compiler(capability: int, names: list[str]) -> Callable[..., None]:
    """What stands for a launch: compiles the kernel for a GPU, with the arguments that it was launched with."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature, constants, hints = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = given.pop(parameter.name)
            if isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
                continue
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            number = "fp32" if isinstance(value, float) else "i32"
            signature[parameter.name] = "*" + TYPES[value.dtype] if isinstance(value, torch.Tensor) else number
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                hints[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)
        assert made.asm["cubin"]
        assert made.metadata.shared <= SHARED[capability], (kernel.__name__, given)
        names.append(kernel.__name__)

    return launch


@given(slots=st.integers(0, backend.MOST_SLOTS), rows=st.sampled_from([1024, 4096, 10240, 1 << 30]))
def test_no_grid_is_wider_than_a_gpu_takes(slots: int, rows: int) -> None:
    chunk = backend._chunk(rows, slots)
    assert chunk % rows == 0
    assert backend._tiles(slots, backend.MOST_EXPERTS, chunk) <= 65_535
    assert chunk == rows or slots > rows << 15


def test_fp32_is_tf32_only_where_the_user_allows_it() -> None:
    assert backend._arithmetic(torch.float32)["PRECISION"] == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert backend._arithmetic(torch.float32)["PRECISION"] == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(("width", "whole"), [(256, False), (768, False), (1024, True), (4096, True)])
def test_gradients_of_matrices_that_fill_a_gpu_are_not_cut(
    width: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their parts, for the worst routing, would take more memory than the matrices."""
    kernels = pytest.importorskip("moelab.experts.triton_kernels", reason="Triton is not installed: pip install triton")
    launched: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *given, **_: launched.append(given)

    for name in ("weight_gradient", "sum_parts"):
        monkeypatch.setattr(kernels, name, Kernel())
    with torch.device("meta"):
        x, z = torch.empty(32_768, width, dtype=torch.bfloat16), torch.empty(65_536, 4 * width, dtype=torch.bfloat16)
        w_in, w_out = x.new_empty(8, 4 * width, width), x.new_empty(8, width, 4 * width)
        rows, offsets = torch.empty(65_536, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    backend._weight_gradient("in", z, x, offsets, rows, 2, w_in)
    backend._weight_gradient("out", x, z, offsets, rows, 2, w_out)
    of_in, _, of_out, _ = launched
    assert [len(given[5]) == 0 for given in (of_in, of_out)] == [whole, whole]  # their parts


@pytest.mark.parametrize(
    ("dtype", "width", "activation"),
    [
        (torch.bfloat16, 256, "gelu"),
        pytest.param(torch.bfloat16, 1024, "gelu", marks=pytest.mark.long),
        pytest.param(torch.float32, 256, "gelu", marks=pytest.mark.long),
        pytest.param(torch.float16, 512, "swiglu", marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [80, 90, 100, pytest.param(120, marks=pytest.mark.long)])
def test_every_kernel_compiles(
    capability: int, dtype: torch.dtype, width: int, activation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels are interpreted")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    monkeypatch.setattr(jit.JITFunction, "run", compiler(capability, compiled))
    monkeypatch.setattr(backend, "_generation", lambda _: capability // 10)
    monkeypatch.setattr(backend, "_shared_memory", lambda _: SHARED[capability])
    tokens, hidden, experts, top_k = 512, 512, 8, 2
    inner = inner_size(activation, hidden)  # type: ignore[arg-type]
    x = torch.zeros(tokens, width, dtype=dtype)
    weights, indices = torch.zeros(tokens, top_k), torch.zeros(tokens, top_k, dtype=torch.int64)
    w_in, w_out = x.new_zeros(experts, inner, width), x.new_zeros(experts, width, hidden)
    b_in, b_out = x.new_zeros(experts, inner), x.new_zeros(experts, width)
    _, z, *routing = torch.ops.moelab.fused_experts(x, weights, indices, w_in, w_out, b_in, b_out, activation)
    torch.ops.moelab.fused_experts_backward(
        x, x, weights, indices, w_in, w_out, b_in, b_out, z, *routing, activation
    )  # fmt: skip
    router, logits = torch.zeros(experts, width), torch.zeros(tokens, experts)
    torch.ops.moelab.route(x, router, None, top_k, "softmax", "chosen")
    fused_router._route_backward(x, weights, logits, x, router, indices, logits, "softmax", "chosen")
    head.softmax_kernel(x.new_zeros(2, 50_304), indices[:2, 0].contiguous())
    torch.ops.moelab.activation_backward(x, x, "gelu")
    torch.ops.moelab.heads_backward(*x.view(2, 4, 64, width).expand(3, -1, -1, -1, -1))
    torch.ops.moelab.norm_backward(x, x, x, x[0].float(), True)
    p, one = torch.nn.Parameter(torch.zeros(100)), torch.ones(())
    p.grad = torch.zeros(100)
    for moments, found_inf in ((torch.bfloat16, None), (torch.float32, one)):
        state = {"exp_avg": torch.zeros(100, dtype=moments), "exp_avg_sq": torch.zeros(100, dtype=moments), "step": one}
        optimizer._Launch([p])({p: state}, one, one, found_inf, 0.9, 0.95, 1e-8, 0.1)
    launches = {
        "count", "place", "product", "combine", "slot_gradient", "weight_gradient", "sum_parts", "bias_parts",
        "sum_bias_parts", "route", "logits_gradient", "route_backward", "loss_and_gradient",
        "adamw", "activation_backward", "heads_backward", "norm_backward",
    }  # fmt: skip
    assert set(compiled) == launches, importlib.metadata.version("triton")
