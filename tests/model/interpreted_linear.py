"""Products and norms whose backward passes have kernels, interpreted on a CPU; `test_triton.py` runs this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moelab.config import ModelConfig
from moelab.experts.activation import activate
from moelab.model import linear as module
from moelab.model import norm
from moelab.model.gpt import Block

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # the kernel's GELU is within 2.4e-5


def gradients(
    call: Callable[..., Any], dtype: torch.dtype, sizes: tuple[int, int, int, int], wide: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Outputs, and gradients of x, w and b, for x (B, C, D) and w (O, D)."""
    batch, length, width, outside = sizes
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((batch, length, width), (outside, width), (outside,))
    )
    leaves = [x.to(dtype).requires_grad_(), (w / width**0.5).to(wide).requires_grad_(), b.to(wide).requires_grad_()]
    found = call(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in found]
    return [t.detach() for t in (*found, *torch.autograd.grad(found, leaves, upstream))]


def held(own: list[torch.Tensor], right: list[torch.Tensor], allowed: float) -> None:
    for one, other in zip(own, right, strict=True):
        assert (one.double() - other.double()).norm() <= allowed * other.double().norm()
    assert own[-1].dtype == own[-2].dtype == torch.float32


SIZES = [(2, 50, 24, 48), (1, 3, 8, 24), (3, 64, 16, 1032)]  # rows and columns that fill no program, and several


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "silu"])
def test_an_activated_product_has_the_gradients_of_float64(
    activation: str, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    own = gradients(lambda x, w, b: module.ActivatedLinear.apply(x, w, b, activation), dtype, sizes)
    plain = lambda x, w, b: activate(torch.nn.functional.linear(x, w, b), activation)  # type: ignore[arg-type]  # noqa: E731
    held(own, gradients(plain, torch.float64, sizes, torch.float64), ALLOWED[dtype])


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    ("sizes", "heads"), [((2, 50, 24, 48), 2), ((1, 3, 8, 24), 1), ((2, 40, 16, 1152), 6)], ids=str
)
def test_queries_keys_and_values_have_the_gradients_of_float64(
    sizes: tuple[int, int, int, int], heads: int, dtype: torch.dtype
) -> None:
    own = gradients(lambda x, w, b: module.HeadsLinear.apply(x, w, b, heads), dtype, sizes)
    plain = lambda x, w, b: module._heads(torch.nn.functional.linear(x, w, b), heads)  # noqa: E731
    held(own, gradients(plain, torch.float64, sizes, torch.float64), ALLOWED[dtype])


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_a_product_has_the_gradients_of_float64(dtype: torch.dtype) -> None:
    own = gradients(module.Linear.apply, dtype, SIZES[0])
    held(own, gradients(torch.nn.functional.linear, torch.float64, SIZES[0], torch.float64), ALLOWED[dtype])


def test_gradients_lie_side_by_side_however_they_are_stored() -> None:
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 3, 10, 8, generator=generator) for _ in range(3)]
    stored = (
        given,
        [d.transpose(1, 2).contiguous().transpose(1, 2) for d in given],  # as attention's backward leaves them
        [given[0], given[1].transpose(1, 2).contiguous().transpose(1, 2), given[2]],
        [d.mT.contiguous().mT for d in given],
    )
    right = torch.stack([d.transpose(1, 2).flatten(2) for d in given], 2).flatten(2)
    for three in stored:
        d_qkv, parts = torch.ops.moelab.heads_backward(*three)
        assert torch.equal(d_qkv, right)
        torch.testing.assert_close(parts.sum(0), right.sum((0, 1)))


def test_a_nan_stays_in_its_token() -> None:
    z, dh = torch.zeros(70, 40), torch.ones(70, 40)
    dh[65, 3] = torch.nan
    dz, parts = torch.ops.moelab.activation_backward(dh, z, "gelu")
    assert dz.isnan().nonzero().tolist() == [[65, 3]]
    assert parts.isnan().nonzero().tolist() == [[1, 3]]


def test_programs_of_long_inputs_sum_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._tall(16_383) < module._tall(16_384)
    monkeypatch.setattr(module, "_tall", lambda _: 256)
    dh = torch.randn(300, 40, generator=torch.Generator().manual_seed(2))
    dz, parts = torch.ops.moelab.activation_backward(dh, dh, "silu")
    assert parts.shape == (2, 40)
    torch.testing.assert_close(parts, torch.stack([dz[:256].sum(0), dz[256:].sum(0)]))


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(2, 50, 24), (1, 1, 8), (3, 64, 1032)], ids=str)
def test_a_norm_beside_its_input_has_the_gradients_of_float64(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype
) -> None:
    def found(call: Callable[..., Any], dtype: torch.dtype, wide: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = (3 * torch.randn(shape, generator=generator) + 1).bfloat16()
        vectors = [torch.randn(shape[2], generator=generator).bfloat16().to(wide) for _ in range(3)]
        leaves = [t.requires_grad_() for t in (x.to(dtype), *vectors[: 2 if kind == "rmsnorm" else 3])]
        upstream = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for _ in range(2)]
        both = call(*leaves)
        return [t.detach() for t in (*both, *torch.autograd.grad(both, leaves, upstream))]

    def own(x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return norm.Fork.apply(x + added.detach().to(x.dtype), weight, bias, added, kind)

    def plain(x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return x + added, norm._norm(x + added, weight, bias, kind)

    held(found(own, dtype, torch.float32), found(plain, torch.float64, torch.float64), ALLOWED[dtype])


@pytest.mark.parametrize("change", [{}, {"norm": "rmsnorm"}, {"bias": False, "activation": "swiglu"}], ids=str)
def test_a_compiled_block_gives_every_parameter_its_gradient(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(replace(ModelConfig(layers=1, heads=2, width=32, context=24, vocabulary=64), **change), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    x, upstream = (torch.randn(2, 24, 32, generator=generator) for _ in range(2))

    def results(block: Callable[..., Any]) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y, _ = block(leaf, 0, None)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], upstream)]

    parameters = list(block.parameters())
    plain = results(block)
    for used in (module, norm):
        monkeypatch.setattr(used, "own_backward", lambda *_: torch.compiler.is_compiling())
    torch.compiler.reset()
    for one, other in zip(results(torch.compile(block, backend="aot_eager", fullgraph=True)), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
