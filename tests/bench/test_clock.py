"""Times of a device, of what is known of them."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.bench.clock import idle_share, uncovered

TIME = st.integers(0, 60)


@given(st.lists(st.tuples(TIME, TIME).map(sorted).map(tuple), min_size=1, max_size=12))
def test_what_no_interval_covers_is_counted_as_one_counts_by_hand(intervals: list[tuple[int, int]]) -> None:
    first, last = min(a for a, _ in intervals), max(b for _, b in intervals)
    free = [t for t in range(first, last) if not any(a <= t < b for a, b in intervals)]
    share = uncovered(intervals)  # type: ignore[arg-type]
    assert share is None if first == last else share == pytest.approx(len(free) / (last - first))


def test_without_a_kernel_nothing_is_known() -> None:
    assert uncovered([]) is None
    assert idle_share(lambda: None, 3, torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_gpu_that_waits_for_the_host_is_idle_and_one_with_work_is_not() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(4096, 4096, device=device)

    def waits() -> None:
        (a @ a).sum().item()
        time.sleep(0.05)

    works = torch.cuda.CUDAGraph()
    (a @ a).sum().item()
    with torch.cuda.graph(works):
        for _ in range(10):
            _ = a @ a
    waiting, working = idle_share(waits, 5, device), idle_share(works.replay, 5, device)
    assert waiting is not None
    assert working is not None
    assert waiting > 0.5
    assert working < 0.1
