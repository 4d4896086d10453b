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
    """At least once: where other processes use the GPU too it changes between them every 2 ms."""
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(1024, 1024, device=device)

    def waits() -> None:
        (a @ a).sum().item()
        time.sleep(0.05)

    works = torch.cuda.CUDAGraph()
    (a @ a).sum().item()
    with torch.cuda.graph(works):
        for _ in range(10):
            _ = a @ a
    for step, steps, low, high in ((waits, 3, 0.5, 1.0), (works.replay, 3, 0.0, 0.1)):
        shares = [idle_share(step, steps, device) for _ in range(20)]
        assert any(share is not None and low <= share <= high for share in shares), shares
