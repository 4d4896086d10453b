"""The head in chunks: the loss and gradients of the plain one, a chunk of logits at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import ModelConfig
from moelab.model import GPT, head
from moelab.model.head import next_token_loss, token_losses

SMALL = ModelConfig(layers=2, heads=2, width=32, context=48, vocabulary=320)


def drawn(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x (T, D) in dtype; w (V, D) in fp32, or float64 for that; targets (T,)."""
    g = torch.Generator().manual_seed(tokens + vocabulary)
    x = torch.randn(tokens, width, generator=g).to(dtype)
    w = torch.randn(vocabulary, width, generator=g).to(torch.promote_types(dtype, torch.float32)) / 3
    return [x, w, torch.randint(0, vocabulary, (tokens,), generator=g)]


def exactly(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Loss, and gradients of x and w, in float64."""
    x, w = (t.detach().double().clone().requires_grad_() for t in (x, w))
    loss = F.cross_entropy(x @ w.T, targets)
    return [loss.detach(), *torch.autograd.grad(loss, [x, w])]


def chunked(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, rows: int) -> list[torch.Tensor]:
    x, w = (t.clone().requires_grad_() for t in (x, w))
    loss = next_token_loss(x, w, targets, chunk=rows)
    return [loss.detach(), *torch.autograd.grad(loss, [x, w])]


@given(tokens=st.integers(130, 700), width=st.integers(1, 9), vocabulary=st.integers(2, 40), rows=st.integers(1, 300))
def test_chunks_of_any_size_give_the_plain_loss_and_gradients(
    tokens: int, width: int, vocabulary: int, rows: int
) -> None:
    inputs = drawn(tokens, width, vocabulary)
    for found, expected in zip(chunked(*inputs, rows), exactly(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
def test_every_precision_is_as_near_to_float64_as_the_plain_head(dtype: torch.dtype, allowed: float) -> None:
    inputs = drawn(500, 64, 1_000, dtype)
    expected = exactly(*inputs)
    for rows in (128, 500):  # in chunks, and all at once, which is the plain head
        loss, dx, dw = found = chunked(*inputs, rows)
        assert (loss.dtype, dx.dtype, dw.dtype) == (torch.float32, dtype, torch.float32)
        for one, other in zip(found, expected, strict=True):
            assert ((one.double() - other).norm() / other.norm()).item() <= allowed


def test_the_gradient_follows_the_factor_of_the_loss() -> None:
    inputs = drawn(300, 8, 20)
    _, expected, _ = exactly(*inputs)
    x = inputs[0].clone().requires_grad_()
    loss = next_token_loss(x, *inputs[1:], chunk=1)
    (3 * loss).backward()
    torch.testing.assert_close(x.grad, 3 * expected)


def test_fp16_gradients_under_a_loss_scale_neither_vanish_nor_overflow() -> None:
    x, w, targets = drawn(2_000, 64, 1_000, torch.float16)
    for scale in (2.0**8, 2.0**16):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        found = torch.autograd.grad(scale * next_token_loss(*leaves, targets, chunk=1), leaves)
        for one, other in zip(found, exactly(x, w, targets)[1:], strict=True):
            assert ((one.double() / scale - other).norm() / other.norm()).item() <= 3e-3


def test_losses_of_single_tokens_have_gradients_too() -> None:
    x, w, targets = drawn(300, 8, 20)
    x.requires_grad_()
    next_token_loss(x, w, targets, "none", chunk=1).mean().backward()
    torch.testing.assert_close(x.grad, exactly(x.detach(), w, targets)[1])


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = drawn(600, 32, 200, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(chunked(*inputs, 128), chunked(*inputs, 128), strict=True))


def test_no_more_logits_are_there_than_a_chunk() -> None:
    x, w, targets = drawn(1_024, 8, 4_000, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        chunked(x, w, targets, 128)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 2 * 128 * 4_000 * 4


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", dict.fromkeys(head.CHUNK, 1))


def gradients(model: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_learns_the_same_with_a_tied_and_an_untied_head(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(replace(SMALL, tied_head=tied), dtype=torch.float64)
    ids = torch.randint(0, 320, (6, 49), generator=torch.Generator().manual_seed(0))
    whole = gradients(model, ids)
    monkeypatch.setattr(head, "CHUNK", dict.fromkeys(head.CHUNK, 1))
    for found, expected in zip(gradients(model, ids), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_rows_of_a_padded_vocabulary_take_part_and_are_pushed_down(small_chunks: None) -> None:
    model = GPT(SMALL, dtype=torch.float64)  # bytes: 257 ids, padded to 320
    ids = torch.randint(0, 257, (6, 49), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    by_hand = -torch.log_softmax(model(ids[:, :-1]).logits, -1).gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert (model.token_embedding.grad[257:].abs().sum(1) > 0).all()


def test_the_model_traces_into_one_graph_with_chunks(small_chunks: None) -> None:
    model = GPT(SMALL)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (48, 30):  # the second length is traced as a symbol
        ids = torch.randint(0, 320, (6, length + 1), generator=torch.Generator().manual_seed(length))
        plain = gradients(model, ids)
        loss = traced(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).loss
        found = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("vocabulary", [320, 1_001, 4_096, 50_304, 129_280])
def test_chunks_are_right_on_a_gpu(vocabulary: int, dtype: torch.dtype, allowed: float) -> None:
    inputs = [t.cuda() for t in drawn(1_000, 64, vocabulary, dtype)]
    expected = exactly(*inputs)
    for rows in (128, 512, 1_000):
        first, again = chunked(*inputs, rows), chunked(*inputs, rows)
        for one, two, other in zip(first, again, expected, strict=True):
            assert torch.equal(one, two)
            assert ((one.double() - other).norm() / other.norm()).item() <= allowed


@given(tokens=st.integers(0, 300), chunk=st.integers(1, 400))
def test_losses_that_nothing_is_learnt_from_are_the_plain_ones(tokens: int, chunk: int) -> None:
    x, w, targets = torch.randn(tokens, 8), torch.randn(50, 8), torch.randint(50, (tokens,))
    losses = token_losses(x, w, targets, chunk)
    torch.testing.assert_close(losses, F.cross_entropy(x @ w.T, targets, reduction="none"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_scores_chunk_by_chunk(dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randn(n, 256, device="cuda", generator=g) for n in (20_000, 50_304))
    x, w = x.to(dtype), 0.1 * w
    targets = torch.randint(50_304, (20_000,), device="cuda", generator=g)
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses = next_token_loss(x, w, targets, "none")
        assert torch.cuda.max_memory_allocated() - before < 1.3 * 8_192 * 50_304 * x.itemsize + 1e8
        right = F.cross_entropy((x[-500:].double() @ w.to(dtype).double().T), targets[-500:], reduction="none")
        assert (losses[-500:] - right).norm() / right.norm() <= (1e-5 if dtype == torch.float32 else 1e-2)
        torch.testing.assert_close(next_token_loss(x, w, targets), losses.mean())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("warps", "programs"), [(32, 1), (16, 2), (32, 2), (8, 4)])
def test_the_kernel_is_right_with_any_warps(warps: int, programs: int, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(300, 50_304, generator=g, device="cuda")).to(dtype)
    targets = torch.randint(0, 50_304, (300,), generator=g, device="cuda")
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), [exact])
    found = head.softmax_kernel(logits, targets, warps, programs)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert (logits.double() - gradient).norm() <= allowed * gradient.norm()


@pytest.mark.gpu
def test_a_gpu_keeps_no_second_copy_of_few_logits() -> None:
    tokens, vocabulary = 1_024, 50_304
    x, w, targets = (t.cuda() for t in drawn(tokens, 64, vocabulary, torch.bfloat16))
    x, w = x.requires_grad_(), w.requires_grad_()
    next_token_loss(x, w, targets).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    next_token_loss(x, w, targets).backward()
    torch.cuda.synchronize()
    logits, of_weight = tokens * vocabulary * 2, 64 * vocabulary
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * (logits + of_weight * (2 + 4 + 4))


@pytest.mark.gpu
def test_chunks_are_captured_and_compiled_and_hold_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, width, vocabulary, rows = 8_192, 256, 50_304, 1_024
    x, w, targets = (t.cuda() for t in drawn(tokens, width, vocabulary, torch.bfloat16))
    monkeypatch.setattr(head, "CHUNK", dict.fromkeys(head.CHUNK, rows))
    x, w = x.requires_grad_(), w.requires_grad_()
    expected = torch.autograd.grad(next_token_loss(x, w, targets), [x, w])
    traced = torch.compile(next_token_loss, fullgraph=True)

    def step() -> list[torch.Tensor]:
        return list(torch.autograd.grad(traced(x, w, targets), [x, w]))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert ((one - other).norm() / other.norm()).item() <= 1e-3
    of_weight, of_x = vocabulary * width, tokens * width
    # A chunk's logits; the weight cast, its gradient and that times the loss's; x's two gradients; a little.
    assert most <= 1.1 * (rows * vocabulary * 2 + of_weight * (2 + 4 + 4) + of_x * 4)
