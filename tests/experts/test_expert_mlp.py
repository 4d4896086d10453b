"""Every backend against one float64 definition, forward and backward, at the sizes where kernels go wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import expert_mlp
from moelab.config import Activation, UsageError
from moelab.experts import hopper
from moelab.experts.activation import activate
from moelab.experts.choice import Shape
from moelab.experts.mlp import BACKENDS
from moelab.experts.self_check import refusal

# Those that say that they can be used: one that is wrong then fails here.
ON_CPU = [name for name, module in BACKENDS.items() if module.unusable(torch.device("cpu")) is None]
ON_BOTH = [
    *((name, "cpu") for name in ON_CPU),
    *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in BACKENDS),
]
ACTIVATIONS = get_args(Activation)
NAMES = ("x", "weights", "w_in", "w_out", "b_in", "b_out")


def skip_where_unusable(backend: str, device: str) -> None:
    """One that can be used and is wrong fails."""
    if (reason := BACKENDS[backend].unusable(torch.device(device))) is not None:
        pytest.skip(f"{backend}: {reason}")


@dataclass
class Problem:
    """One call of expert_mlp: float64 inputs that round to the tested dtype without loss, and the routing."""

    tensors: dict[str, torch.Tensor]
    indices: torch.Tensor
    activation: Activation
    upstream: torch.Tensor

    def run(self, backend: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
        """The output, and the gradient of each input, under the upstream gradient."""
        skip_where_unusable(backend, device)
        leaves = {n: t.detach().to(device, dtype).requires_grad_() for n, t in self.tensors.items()}
        y = expert_mlp(**leaves, indices=self.indices.to(device), activation=self.activation, backend=backend)
        assert y.dtype == dtype
        y.backward(self.upstream.to(device, dtype))
        return {"y": y.detach()} | {n: t.grad for n, t in leaves.items() if t.grad is not None}

    def definition(self) -> dict[str, torch.Tensor]:
        """The formula of the docstring, token by token, in float64."""
        leaves = {n: t.clone().requires_grad_() for n, t in self.tensors.items()}
        of = {n: t.unbind() for n, t in leaves.items()}  # a slice has a gradient of its own size
        rows = []
        for t in range(len(self.indices)):
            row = of["x"][t] * 0
            for k, e in enumerate(self.indices[t].tolist()):
                if e >= 0:
                    h = of["w_in"][e] @ of["x"][t]
                    h = activate(h + of["b_in"][e] if "b_in" in of else h, self.activation)
                    y = of["w_out"][e] @ h
                    y = y + of["b_out"][e] if "b_out" in of else y
                    row = row + of["weights"][t][k] * y
            rows.append(row)
        y = torch.stack(rows) if rows else leaves["x"] * 0
        y.backward(self.upstream.double())
        return {"y": y.detach()} | {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def problem(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, *, activation: Activation = "gelu",
    bias: bool = True, dropped: float = 0.0, seed: int = 0, idle: tuple[int, ...] = (),
) -> Problem:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).bfloat16().double()

    inner = 2 * hidden if activation == "swiglu" else hidden
    allowed = [e for e in range(experts) if e not in idle]
    order = torch.rand(tokens, len(allowed), generator=g).argsort(-1)
    indices = torch.tensor(allowed)[order[:, :top_k]].reshape(tokens, top_k)
    indices[torch.rand(indices.shape, generator=g) < dropped] = -1
    tensors = {
        "x": draw(tokens, width),
        "weights": torch.rand(tokens, top_k, generator=g).bfloat16().double(),
        "w_in": draw(experts, inner, width) / 4,
        "w_out": draw(experts, width, hidden) / 4,
    }
    if bias:
        tensors |= {"b_in": draw(experts, inner), "b_out": draw(experts, width)}
    return Problem(tensors, indices, activation, draw(tokens, width))


def problem_of(backend: str, tokens: int, width: int, hidden: int, *sizes: int, **given: Any) -> Problem:
    """`problem`, of sizes that the backend takes."""
    step = hopper.ROWS if backend == "hopper" else 1
    return problem(tokens, -(-width // step) * step, -(-hidden // step) * step, *sizes, **given)


def within(p: Problem, backend: str, dtype: torch.dtype) -> Problem:
    """The problem, without biases where the backend takes none."""
    experts, width, hidden = p.tensors["w_out"].shape
    shape = Shape(width, hidden, experts, p.indices.shape[1])
    if refusal(BACKENDS[backend], dtype, p.activation, bias=True, shape=shape) is None:
        return p
    if reason := refusal(BACKENDS[backend], dtype, p.activation, bias=False, shape=shape):
        pytest.skip(reason)
    return replace(p, tensors={n: t for n, t in p.tensors.items() if not n.startswith("b_")})


def widest(backend: str) -> torch.dtype:
    """float64 where the backend takes it."""
    refused = refusal(BACKENDS[backend], torch.float64, "gelu", bias=False)
    return torch.float32 if refused else torch.float64


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; the plain norm where the expected value is 0."""
    scale = expected.norm().item() or 1.0
    return (found.double().cpu() - expected).norm().item() / scale


# Triton's interpreter cuts off what bf16 cannot hold instead of rounding it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16 = 2e-2 if INTERPRETED else 1e-2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: BF16, torch.float16: 2e-3}


def assert_equal_to_definition(p: Problem, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    p = within(p, backend, dtype)
    expected, found = p.definition(), p.run(backend, dtype, device)
    for name in expected:
        assert distance(found[name], expected[name]) <= TOLERANCE[dtype], name


PROBLEMS = st.builds(
    problem,
    tokens=st.integers(0, 20),
    width=st.integers(1, 19),
    hidden=st.integers(1, 17),
    experts=st.integers(4, 9),
    top_k=st.integers(1, 4),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=12 if INTERPRETED else 60)
@given(p=PROBLEMS)
def test_outputs_and_gradients_are_the_definitions_in_the_widest_precision(backend: str, p: Problem) -> None:
    assert_equal_to_definition(p, backend, widest(backend))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(96, 100, 60, 8, 2), (40, 33, 50, 3, 3), (64, 16, 24, 64, 4), (1, 8, 8, 4, 1), (20, 12, 600, 1, 1)],
    ids=str,
)
def test_lower_precision_is_within_its_tolerance(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]
) -> None:
    assert_equal_to_definition(problem(*sizes), backend, dtype)


SIZES = (16, 24, 8, 2)  # D, F, E, K, where others show nothing new: Triton compiles its kernels for each


@pytest.mark.parametrize(("backend", "device"), ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_idle_expert_gets_a_gradient_of_exactly_0(backend: str, device: str, dtype: torch.dtype) -> None:
    p = within(problem_of(backend, 30, *SIZES, idle=(0, 3, 5)), backend, dtype)
    found = p.run(backend, dtype, device)
    for name in p.tensors.keys() - {"x", "weights"}:
        assert not found[name][[0, 3, 5]].any()
        assert found[name][[1, 2, 4, 6, 7]].flatten(1).any(1).all()


@pytest.mark.parametrize(("backend", "device"), ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_may_go_to_one_expert(backend: str, device: str, dtype: torch.dtype) -> None:
    assert_equal_to_definition(problem_of(backend, 200, 12, 20, 5, 1, idle=(0, 1, 3, 4)), backend, dtype, device)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_tokens_and_all_slots_dropped_give_zeros_of_the_right_shape(backend: str, tokens: int) -> None:
    found = within(problem(tokens, 8, 8, 4, 2, dropped=1.0), backend, torch.float32).run(backend, torch.float32)
    assert found["y"].shape == (tokens, 8)
    assert not any(t.any() for t in found.values())


@pytest.mark.parametrize(("backend", "device"), ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_twice_gives_the_same_bits(backend: str, device: str, dtype: torch.dtype) -> None:
    tokens = 20_000 if device == "cuda" else 50 if INTERPRETED else 200  # on a GPU enough for sums in several parts
    p = within(problem_of(backend, tokens, *SIZES, dropped=0.1), backend, dtype)
    first, second = p.run(backend, dtype, device), p.run(backend, dtype, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("backend", "device"), ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs_and_expanded_gradients_change_nothing(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    p = within(problem_of(backend, 30, *SIZES), backend, dtype)
    straight = {n: t.to(device, dtype).requires_grad_() for n, t in p.tensors.items()}
    askew = {n: every_other(t.to(device, dtype)).requires_grad_() for n, t in p.tensors.items()}
    indices, outputs = p.indices.to(device), []
    for leaves, places in ((straight, indices), (askew, indices.T.contiguous().T)):
        y = expert_mlp(**leaves, indices=places, activation="gelu", backend=backend)
        y.sum().backward()
        outputs.append(y.detach())
    assert distance(outputs[1], outputs[0].double().cpu()) <= TOLERANCE[dtype]
    for name in p.tensors:
        expected = straight[name].grad
        assert expected is not None
        assert distance(askew[name].grad, expected.double().cpu()) <= TOLERANCE[dtype], name


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between them, columns first."""
    return t.mT.repeat_interleave(2, dim=-1)[..., ::2].mT.detach()


@pytest.mark.parametrize(("backend", "device"), ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_in_its_tokens_output_and_input_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    p = within(problem_of(backend, 20, *SIZES), backend, dtype)
    p.tensors["x"][7] = float("nan")
    found = p.run(backend, dtype, device)
    for name in ("y", "x", "weights"):
        assert found[name][7].isnan().any()
        assert not torch.cat([found[name][:7], found[name][8:]]).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_does_not_reach_the_row_before_it(dtype: torch.dtype) -> None:
    """As it does in PyTorch's own products on a CPU with bf16 matrix units."""
    rows, w, offsets = torch.randn(64, 600), torch.randn(1, 30, 600), torch.tensor([64], dtype=torch.int32)
    rows[40:] = float("nan")
    y = torch.ops.moelab.expert_product(rows.to(dtype), w.to(dtype).mT, None, offsets)
    assert y[:40].isfinite().all()
    assert y[40:].isnan().all()


@pytest.mark.parametrize(("backend", "device"), ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_token_without_an_expert_reaches_nothing(
    backend: str, device: str, dtype: torch.dtype, value: float
) -> None:
    """Its rows are sorted after the last expert's, beside rows that a product may read to fill a tile."""
    p = within(problem_of(backend, 40, *SIZES, dropped=0.2), backend, dtype)
    p.indices[[0, 7, 39]] = -1
    expected = p.definition()
    for name in ("x", "weights"):
        p.tensors[name][[0, 7, 39]] = value
    p.upstream[[0, 7, 39]] = value
    found = p.run(backend, dtype, device)
    assert not found["x"][[0, 7, 39]].any()
    for name in expected:
        assert distance(found[name], expected[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", ON_CPU)
def test_an_expert_chosen_twice_by_one_token_counts_twice(backend: str) -> None:
    p = problem(6, 8, 8, 4, 2)
    p.indices[:, 1] = p.indices[:, 0]
    assert_equal_to_definition(p, backend, widest(backend))


def test_gradcheck_of_the_yardstick() -> None:
    p = problem(4, 3, 5, 3, 2, activation="swiglu", dropped=0.2)
    leaves = [p.tensors[n].clone().requires_grad_() for n in NAMES]

    def call(x, weights, w_in, w_out, b_in, b_out):  # type: ignore[no-untyped-def]
        return expert_mlp(
            x, weights, p.indices, w_in, w_out, b_in, b_out, activation="swiglu", backend="reference"
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_traces_into_one_graph(dtype: torch.dtype) -> None:
    p = problem(32, 16, 24, 4, 2)
    eager = p.run("grouped_mm", dtype)
    leaves = {n: t.to(dtype).requires_grad_() for n, t in p.tensors.items()}
    traced = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    y = traced(**leaves, indices=p.indices, activation="gelu", backend="grouped_mm")
    y.backward(p.upstream.to(dtype))
    assert torch.equal(y, eager["y"])
    assert all(torch.equal(leaves[n].grad, eager[n]) for n in leaves)


def test_operators_fit_their_fake_kernels() -> None:
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    rows, w, d_y = torch.randn(6, 4), torch.randn(3, 4, 7), torch.randn(6, 7)
    torch.library.opcheck(torch.ops.moelab.expert_product.default, (rows, w, torch.randn(3, 7), offsets))
    torch.library.opcheck(torch.ops.moelab.expert_weight_gradient.default, (d_y, rows, offsets))


REFUSED = {
    "activation": ({"activation": "elu"}, "activation = elu: give one of gelu"),
    "backend": ({"backend": "fast"}, "backend = fast: give one of auto"),
    "index": ({"indices": torch.full((5, 2), 4)}, "indices = 4 … 4: give 0 to 3, or −1"),
    "float indices": ({"indices": torch.zeros(5, 2)}, "give (T, K) integers"),
    "w_in": ({"w_in": torch.zeros(4, 8, 9)}, "w_in = (4, 8, 9) float32: give (4, 8, 8)"),
    "b_out": ({"b_out": torch.zeros(8)}, "b_out = (8,) float32: give (4, 8)"),
    "bool indices": ({"indices": torch.zeros(5, 2, dtype=torch.bool)}, "indices = (5, 2) bool: give (T, K) integers"),
    "x": ({"x": torch.zeros(5, 2, 4)}, "give (T, D) floating point"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_do_not_fit_are_refused_in_one_line(case: str) -> None:
    p = problem(5, 8, 8, 4, 2)
    change, line = REFUSED[case]
    call = {n: t.float() for n, t in p.tensors.items()} | {"indices": p.indices} | change
    with pytest.raises(UsageError) as refused:
        expert_mlp(**call)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


MANY = [(300, 100, 600, 8, 2), (257, 64, 128, 64, 4), (90, 33, 50, 3, 3), (70, 40, 24, 1, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sizes", "dropped", "dtype"),
    [
        *((s, 0.3, d) for s in MANY for d in (torch.float32, torch.bfloat16, torch.float16)),
        # One token of four experts: of two a norm of two sums is at times all cancellation.
        *((s, 0.0, torch.bfloat16) for s in (*MANY, (1, 16, 24, 8, 4), (0, 16, 24, 8, 2))),
    ],
    ids=str,
)
def test_a_gpu_gives_the_definition(
    backend: str, sizes: tuple[int, int, int, int, int], dropped: float, dtype: torch.dtype
) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    assert_equal_to_definition(problem_of(backend, *sizes, dropped=dropped), backend, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gpu_gives_the_definition_of_every_activation(
    backend: str, activation: Activation, dtype: torch.dtype, bias: bool
) -> None:
    p = problem_of(backend, 130, 100, 60, 8, 2, activation=activation, bias=bias, dropped=0.1)
    assert_equal_to_definition(p, backend, dtype, "cuda")


LARGE = {  # T, D, F, E: more than 2³¹ elements of
    "hidden layers": (262_400, 128, 8_192, 2),
    "tokens": (1_050_000, 2_048, 128, 2),
    "weights": (400, 2_048, 8_320, 128),
}


@pytest.mark.gpu
@pytest.mark.xdist_group("all of the GPU's memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", LARGE)
def test_more_elements_than_32_bits_count_are_right_at_the_far_end(backend: str, of: str) -> None:
    """The gradient comes in at a sample of tokens, the first and the last ones, and so all of it is that sample's."""
    skip_where_unusable(backend, "cuda")
    tokens, width, hidden, experts = LARGE[of]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 74 * 2**30:
        pytest.skip(f"needs 74 GiB of free GPU memory, and there are {free / 2**30:.0f}")
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)

    assert max(tokens * hidden, tokens * width, experts * width * hidden) > 2**31
    x, weights = draw(tokens, width), torch.rand(tokens, 1, generator=g, device="cuda")
    w_in, w_out = draw(experts, hidden, width).mul_(width**-0.5), draw(experts, width, hidden).mul_(hidden**-0.5)
    indices = torch.full((tokens, 1), experts - 1, device="cuda")
    indices[: tokens // 8] = 0
    sample = torch.cat([torch.arange(60), torch.arange(tokens - 60, tokens)]).cuda()
    upstream = torch.zeros_like(x)
    upstream[sample] = draw(len(sample), width)
    leaves = [t.requires_grad_() for t in (x, weights, w_in, w_out)]
    try:
        y = expert_mlp(x, weights, indices, w_in, w_out, backend=backend)
    except UsageError as refused:
        pytest.skip(str(refused))
    gradients = torch.autograd.grad(y, leaves, upstream)
    assert gradients[0].count_nonzero(1).count_nonzero() == len(sample)
    assert not any(gradients[i][1:-1].any() for i in (2, 3))  # idle experts
    ends = [0, experts - 1]
    # The sample and its two experts alone, in float64.
    few = [t.detach().double().requires_grad_() for t in (x[sample], weights[sample], w_in[ends], w_out[ends])]
    right = expert_mlp(few[0], few[1], (indices[sample] > 0).long(), few[2], few[3], backend="reference")
    expected = torch.autograd.grad(right, few, upstream[sample].double())
    found = [gradients[0][sample], gradients[1][sample], gradients[2][ends], gradients[3][ends]]
    for name, one, other in zip(NAMES, found, expected, strict=False):
        assert distance(one, other.cpu()) <= TOLERANCE[torch.bfloat16], name
    assert distance(y[sample].detach(), right.detach().cpu()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_was_never_written_is_never_read(backend: str) -> None:
    """grouped_mm leaves the rows of dropped slots as they were; here they were NaN."""
    torch.full((64 * 2**20,), float("nan"), dtype=torch.bfloat16, device="cuda")
    assert_equal_to_definition(
        problem_of(backend, 300, 100, 60, 8, 2, dropped=0.5, idle=(0, 7)), backend, torch.bfloat16, "cuda"
    )


@pytest.mark.gpu
def test_bf16_on_a_gpu_neither_breaks_the_graph_nor_waits_for_the_device() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("grouped_mm has its one kernel on Hopper and data-centre Blackwell")
    p = problem(256, 64, 128, 8, 2)
    leaves = {n: t.to("cuda", torch.bfloat16).requires_grad_() for n, t in p.tensors.items()}
    indices, upstream = p.indices.cuda(), p.upstream.to("cuda", torch.bfloat16)
    traced = torch.compile(expert_mlp, fullgraph=True)
    for call in (expert_mlp, traced):
        call(**leaves, indices=indices, backend="grouped_mm").backward(upstream)  # warm: kernels load here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(**leaves, indices=indices, backend="grouped_mm").backward(upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
