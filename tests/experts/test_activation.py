"""The activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from moelab.experts.activation import FusedGelu, activate

Function = Callable[..., torch.Tensor]


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit type."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


def gelu_and_slope(call: Function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_the_fused_gelu_and_its_derivative_are_those_of_float64() -> None:
    """The bounds that its polynomial was fitted to."""
    x = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    for found, expected, allowed in zip(
        gelu_and_slope(FusedGelu.apply, x), gelu_and_slope(F.gelu, x), (1.1e-6, 2.5e-5), strict=True
    ):
        assert (found - expected).abs().max() <= allowed


def test_the_fused_gelu_of_every_16_bit_number_is_the_nearest_one_to_the_exact_or_its_neighbour() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = every(dtype)
        exact = F.gelu(x.double())
        found = FusedGelu.apply(x)
        assert found.dtype == dtype
        step = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
        assert ((found.double() - exact).abs() <= step).all()
        _, slope = gelu_and_slope(FusedGelu.apply, x)
        assert slope.isfinite().all()
    assert FusedGelu.apply(torch.tensor([torch.nan], dtype=torch.bfloat16)).isnan().all()


def test_the_fused_gelu_is_traced_into_one_graph() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled = torch.compile(FusedGelu.apply, fullgraph=True, backend="aot_eager")
    for one, other in zip(gelu_and_slope(compiled, x), gelu_and_slope(FusedGelu.apply, x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_fused_gelu_in_bf16_is_the_exact_one_rounded_more_often_than_pytorchs() -> None:
    x = every(torch.bfloat16)
    nearest = F.gelu(x.double()).bfloat16()
    assert (FusedGelu.apply(x) != nearest).sum() < (F.gelu(x) != nearest).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_gelu_keeps_infinity_and_hides_no_nan(dtype: torch.dtype) -> None:
    largest = -torch.finfo(dtype).max
    x = torch.tensor([torch.inf, torch.nan, 0.0, -0.0, -200.0, largest], dtype=dtype)
    y, slope = gelu_and_slope(FusedGelu.apply, x)
    assert y[0] == torch.inf
    assert y[1].isnan()
    assert not y[2:].any()
    assert slope[1].isnan()
    assert not slope[4:].any()


def test_a_compiler_keeps_no_more_for_the_fused_gelu_than_for_pytorchs() -> None:
    g = torch.Generator().manual_seed(0)
    x, w_in, b_in, w_out = (
        torch.randn(*shape, generator=g).bfloat16().requires_grad_() for shape in ((64, 16), (48, 16), (48,), (16, 48))
    )

    def feed(x: torch.Tensor, act: Function) -> torch.Tensor:
        return F.linear(act(F.linear(x, w_in, b_in)), w_out)

    def kept(function: Function) -> int:
        sizes: list[int] = []

        def forward(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Function:
            inputs = graph.graph.find_nodes(op="placeholder")
            outputs = graph.graph.output_node().args[0]
            sizes.append(sum(node.meta["val"].nbytes for node in outputs[1:] if node not in inputs))
            return make_boxed_func(graph)

        backend = aot_autograd(
            fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph),
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip
        torch.compiler.reset()
        torch.compile(function, fullgraph=True, backend=backend)(x).sum().backward()
        return sizes[0]

    assert kept(partial(feed, act=FusedGelu.apply)) <= kept(partial(feed, act=F.gelu))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_on_a_gpu_gelu_is_the_exact_one_or_its_neighbour(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    x = every(dtype)
    exact = gelu_and_slope(F.gelu, x.double())
    found = gelu_and_slope(torch.compile(partial(activate, activation="gelu"), fullgraph=True), x.cuda())
    for one, other, error in zip(found, exact, (1.2e-6, 2.5e-5), strict=True):
        step = torch.finfo(dtype).eps * other.abs() + torch.finfo(dtype).smallest_normal + error
        assert ((one.cpu().double() - other).abs() <= step).all()
