"""The Triton kernels, interpreted on a CPU: small, and against float64. `test_triton.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moelab.experts import reference, self_check, triton

SHAPES = [(37, 20, 36, 5, 2), (150, 100, 70, 4, 1), (9, 16, 33, 3, 3)]  # T, D, F, E, K


def drawn(shape: tuple[int, ...], activation: str, bias: bool, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """x, weights, w_in, w_out, b_in, b_out and the upstream gradient, as dtype rounds them."""
    tokens, width, hidden, experts, top_k = shape
    inner = 2 * hidden if activation == "swiglu" else hidden
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(s, generator=generator) / 3
        for s in (
            (tokens, width), (tokens, top_k), (experts, inner, width), (experts, width, hidden), (experts, inner),
            (experts, width), (tokens, width),
        )
    ]  # fmt: skip
    rounded: list[torch.Tensor | None] = [t if i == 1 else t.to(dtype) for i, t in enumerate(made)]
    return rounded if bias else [*rounded[:4], None, None, rounded[6]]


def routed(shape: tuple[int, ...]) -> torch.Tensor:
    """Different experts for a token, the last expert idle where there are enough, one slot dropped."""
    tokens, _, _, experts, top_k = shape
    generator = torch.Generator().manual_seed(1)
    busy = experts - 1 if experts > top_k else experts
    indices = torch.stack([torch.randperm(busy, generator=generator)[:top_k] for _ in range(tokens)])
    indices[2, 0] = -1
    return indices


def results(module, inputs, indices, activation: str, dtype: torch.dtype) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [t if t is None else t.to(wide if i == 1 else dtype).requires_grad_() for i, t in enumerate(inputs[:6])]
    x, weights, *parameters = leaves
    y = module.expert_mlp(x, weights, indices, *parameters, activation)
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], inputs[6].to(y.dtype))
    return [y.detach(), *gradients]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "silu", "swiglu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_float64(shape: tuple[int, ...], activation: str, bias: bool) -> None:
    indices = routed(shape)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):  # the interpreter cuts bf16 off
        inputs = drawn(shape, activation, bias, dtype)
        found = results(triton, inputs, indices, activation, dtype)
        expected = results(reference, inputs, indices, activation, torch.float64)
        for one, other in zip(found, expected, strict=True):
            assert ((one.double() - other).norm() / other.norm()).item() <= tolerance


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # in rows that are nobody's
def test_the_trials_of_the_self_check_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    *small, large = triton.TRIALS  # the last with rows for one turn of its loops, and some
    monkeypatch.setattr(triton, "TRIALS", (*small, large._replace(tokens=250)))
    assert self_check.failure(triton, torch.device("cpu")) is None


def test_an_idle_expert_has_gradient_0_and_no_tokens_give_no_rows() -> None:
    shape = (37, 20, 36, 5, 2)
    inputs = drawn(shape, "gelu", True, torch.float32)
    _, _, _, d_w_in, d_w_out, d_b_in, d_b_out = results(triton, inputs, routed(shape), "gelu", torch.float32)
    assert all(not gradient[4].any() for gradient in (d_w_in, d_w_out, d_b_in, d_b_out))
    empty = drawn((0, 20, 36, 5, 2), "gelu", True, torch.float32)
    y, *gradients = results(triton, empty, torch.empty(0, 2, dtype=torch.int64), "gelu", torch.float32)
    assert y.shape == (0, 20)
    assert not any(gradient.any() for gradient in gradients)


def test_a_nan_in_one_token_stays_in_that_token() -> None:
    shape = (37, 20, 36, 5, 2)
    inputs = drawn(shape, "gelu", True, torch.float32)
    assert inputs[0] is not None
    inputs[0][7, 3] = torch.nan
    y, d_x, *_ = results(triton, inputs, routed(shape), "gelu", torch.float32)
    for values in (y, d_x):
        assert values.isnan().any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("enough", [triton.ENOUGH, 9])
def test_long_sums_are_added_in_parts(enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows for some experts, one for others, none for the idle one; tiles in groups. Of a matrix of
    as many tiles as are enough the sums are whole."""
    monkeypatch.setattr(triton, "ENOUGH", enough)
    monkeypatch.setattr(triton, "WIDE", triton.Tile(16, 16, 16, warps=4, group=3, chunk=32))
    shape = (150, 36, 40, 5, 2)
    indices = routed(shape)
    indices[:120, 0] = 1  # nearly all to one expert
    indices[:120, 1] = torch.where(indices[:120, 1] == 1, 2, indices[:120, 1])
    inputs = drawn(shape, "gelu", True, torch.float32)
    found = results(triton, inputs, indices, "gelu", torch.float32)
    expected = results(reference, inputs, indices, "gelu", torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() <= 1e-5


def test_an_epilogue_in_halves_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (37, 20, 130, 3, 2)
    inputs = drawn(shape, "gelu", True, torch.float32)
    whole = results(triton, inputs, routed(shape), "gelu", torch.float32)
    monkeypatch.setattr(triton, "WIDE", triton.WIDE._replace(halves=True))
    for one, other in zip(results(triton, inputs, routed(shape), "gelu", torch.float32), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_operands_through_the_tensor_memory_accelerator_give_the_same(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows past an expert's end that are another's, or nobody's: NaN in them must not come through."""
    tile = triton.Tile(32, 16, 16, warps=4, chunk=40)
    monkeypatch.setattr(triton, "WIDE", tile)
    shape = (150, 48, 64, 5, 2)
    inputs = drawn(shape, activation, True, torch.float32)
    inputs[0][7] = torch.nan  # type: ignore[index]
    indices = routed(shape)
    plain = results(triton, inputs, indices, activation, torch.float32)
    monkeypatch.setattr(triton, "WIDE", tile._replace(maps=True))
    check, maps = TensorDescriptor.__post_init__, []  # the check is of alignment and strides

    def made(descriptor: TensorDescriptor) -> None:
        check(descriptor)
        maps.append(descriptor.block_shape)

    monkeypatch.setattr(TensorDescriptor, "__post_init__", made)
    used = []
    shifts = (0, 1) if activation == "gelu" else (0,)
    for shift in shifts:  # of the matrices, from where 16 bytes begin
        maps.clear()
        inputs[2:4] = [shifted(w, shift) for w in inputs[2:4]]
        mapped = results(triton, inputs, indices, activation, torch.float32)
        used.append(len(maps))
        for one, other in zip(mapped, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
        for gradient in mapped[3:5]:
            assert gradient.isnan().any((1, 2)).nonzero().flatten().tolist() == sorted(indices[7].tolist())
    assert used == sorted(set(used), reverse=True)
    assert used[-1] > 0


def shifted(w: torch.Tensor | None, elements: int) -> torch.Tensor:
    """The same matrices, so many elements further on in memory."""
    assert w is not None
    memory = w.new_empty(w.numel() + elements)
    return memory[elements:].view(w.shape).copy_(w)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (700, 3, 2), (5000, 64, 1), (3000, 8, 4), (2100, 2047, 2), (300, 8191, 1)],
)
def test_slots_are_sorted_by_expert_and_stay_in_order(tokens: int, experts: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(-1, experts, (tokens, top_k), generator=generator)
    slot_of_row, row_of_slot, offsets = triton.sort_slots(indices, experts)
    expert = torch.where(indices < 0, experts, indices).flatten()
    order = torch.sort(expert, stable=True).indices
    assert slot_of_row.tolist() == order.tolist()
    assert row_of_slot[order].tolist() == list(range(indices.numel()))
    assert offsets.tolist() == torch.bincount(expert, minlength=experts + 1).cumsum(0)[:experts].tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("experts", [3, 127, 200])
def test_slots_of_every_integer_type_are_sorted_and_none_counted_twice(dtype: torch.dtype, experts: int) -> None:
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, min(experts, torch.iinfo(dtype).max), (37, 2), generator=generator).to(dtype)
    slot_of_row, _, offsets = triton.sort_slots(indices, experts)
    assert offsets.tolist() == torch.bincount(indices.flatten().int(), minlength=experts).cumsum(0).tolist()
    assert slot_of_row.tolist() == torch.sort(indices.flatten(), stable=True).indices.tolist()


def test_an_index_past_32_bits_is_dropped() -> None:
    indices = torch.tensor([[1, 2**32], [2**32 + 1, 0]])
    assert triton.sort_slots(indices, 2)[2].tolist() == [1, 2]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_fit_their_fake_kernels(activation: str, bias: bool) -> None:
    shape = SHAPES[0]
    indices = routed(shape).clamp_(min=0)  # rows of dropped slots are not written, and opcheck compares what is there
    inputs = [t if t is None else t.requires_grad_() for t in drawn(shape, activation, bias, torch.float32)[:6]]
    torch.library.opcheck(triton.fused_experts, (*inputs[:2], indices, *inputs[2:], activation))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_what_is_kept_for_the_backward_pass_is_the_input_z_and_the_routing(activation: str) -> None:
    shape = SHAPES[1]
    tokens, width, hidden, experts, top_k = shape
    indices = routed(shape)
    inputs = [t if t is None else t.requires_grad_() for t in drawn(shape, activation, True, torch.float32)[:6]]
    given = {t.data_ptr() for t in inputs[2:] if t is not None}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in given:
            kept[t.data_ptr()] = t.nbytes
        return t

    x, weights, *parameters = inputs
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = triton.expert_mlp(x, weights, indices, *parameters, activation)  # type: ignore[arg-type]
    assert y.grad_fn is not None
    slots, inner = tokens * top_k, 2 * hidden if activation == "swiglu" else hidden
    routing = 4 * slots + 8 * slots + 2 * 4 * slots + 4 * experts  # weights, indices, rows and slots, offsets
    assert sum(kept.values()) <= 4 * (tokens * width + slots * inner) + routing
