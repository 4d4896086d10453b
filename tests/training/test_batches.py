"""The order of the data: each context once an epoch, the same for every arm, targets one token ahead."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import UsageError
from moelab.training.batches import Batches, chain_digest, prefetched


def stream(contexts: int, context: int) -> np.ndarray:
    return np.arange(contexts * context + 1, dtype=np.uint16)


@given(contexts=st.integers(1, 40), context=st.integers(1, 9), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_epoch_touches_each_context_once(contexts: int, context: int, batch: int, seed: int) -> None:
    batches = Batches(stream(contexts, context), context, batch, 1, seed)
    steps = -(-3 * contexts // batch)
    order = [start for step in range(steps) for start in batches.starts(step).tolist()]
    for epoch in range(3):
        seen = order[epoch * contexts : (epoch + 1) * contexts]
        assert sorted(seen) == [i * context for i in range(contexts)]


def test_epochs_have_different_orders() -> None:
    batches = Batches(stream(50, 4), 4, 50, 1, 0)
    assert batches.starts(0).tolist() != batches.starts(1).tolist()


@given(batch=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 20))
def test_order_does_not_depend_on_how_a_step_is_cut_into_micro_batches(batch: int, step: int) -> None:
    tokens = stream(30, 4)
    whole, cut = Batches(tokens, 4, 12, 1, 5), Batches(tokens, 4, batch, 12 // batch, 5)
    assert torch.equal(whole.windows(step), cut.windows(step))
    parts = list(cut.micro_batches(cut.windows(step)))
    assert len(parts) == 12 // batch
    assert torch.equal(torch.cat([ids for ids, _ in parts]), whole.windows(step)[:, :-1])


def test_a_step_is_the_same_whichever_step_was_read_before() -> None:
    tokens = stream(30, 4)
    forward, jumping = Batches(tokens, 4, 4, 2, 1), Batches(tokens, 4, 4, 2, 1)
    before = [forward.starts(step).tolist() for step in range(20)]
    assert [jumping.starts(step).tolist() for step in (19, 3, 11)] == [before[step] for step in (19, 3, 11)]


def test_targets_are_the_tokens_that_come_next() -> None:
    batches = Batches(stream(20, 8), 8, 4, 2, 0)
    for ids, targets in batches.micro_batches(batches.windows(3)):
        assert ids.shape == targets.shape == (4, 8)
        assert torch.equal(targets, ids + 1)  # the stream counts up


def test_a_text_shorter_than_one_context_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"6 tokens, fewer than one context of 8.*--context"):
        Batches(np.zeros(7, np.uint16), 8, 1, 1, 0)


def test_the_digest_tells_orders_apart_and_can_be_carried_on() -> None:
    a, b = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    both = chain_digest(chain_digest("", a), b)
    assert both == chain_digest(chain_digest("", a), b)
    assert both != chain_digest(chain_digest("", b), a)


CPU = torch.device("cpu")


@given(first=st.integers(0, 30), count=st.integers(0, 20), block=st.integers(1, 7))
def test_what_is_read_ahead_is_what_would_have_been_read(first: int, count: int, block: int) -> None:
    batches, other = Batches(stream(7, 3), 3, 2, 1, 4), Batches(stream(7, 3), 3, 2, 1, 4)
    digest = "before"
    found = list(prefetched(batches, range(first, first + count), digest, CPU, block=block))
    for (windows, seen), step in zip(found, range(first, first + count), strict=True):
        assert torch.equal(windows, other.windows(step))
        digest = chain_digest(digest, windows)
        assert seen == digest


def test_reading_ahead_stops_with_the_reader() -> None:
    before = threading.active_count()
    ahead = prefetched(Batches(stream(7, 3), 3, 2, 1, 4), range(10_000), "", CPU)
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


@pytest.mark.gpu
def test_windows_reach_a_gpu_whole_and_without_waiting_for_it() -> None:
    batches = Batches(stream(50, 200), 200, 2, 1, 4)
    torch.cuda.set_sync_debug_mode("error")  # a copy that waits raises
    try:
        found = []
        for windows, _ in prefetched(batches, range(60), "", torch.device("cuda"), block=4):
            torch.cuda._sleep(1_000_000)  # the copies queue up behind
            found.append(windows.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(w.cpu(), batches.windows(step)) for step, w in enumerate(found))
