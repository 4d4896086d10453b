"""What stands in for megablocks' compiled parts, what is refused, and the package itself, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.cli import main
from moelab.config import MoEConfig, RunConfig, UsageError
from moelab.experts import check_backend, expert_mlp, megablocks, megablocks_capacity, mlp, reference
from moelab.experts import megablocks_standins as standins
from moelab.experts.megablocks_standins import installed
from moelab.training import train

CPU = torch.device("cpu")
INTEGERS = st.sampled_from([torch.int16, torch.int32, torch.int64])
COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=7)
MISSING = [name for name in ("triton", "megablocks", "stk") if not installed(name)]


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([sum(counts[: i + 1]) for i in range(len(counts))], dtype=torch.int32)


@given(values=st.lists(st.integers(0, 1000), max_size=40), end_bit=st.integers(1, 16), dtype=INTEGERS)
def test_sort_orders_by_the_lowest_bits_and_keeps_equal_ones_in_order(
    values: list[int], end_bit: int, dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=dtype)
    found, places = torch.empty_like(x), torch.empty_like(x)
    standins.sort(x, end_bit, found, places)
    order = sorted(range(len(values)), key=lambda i: values[i] % 2**end_bit)
    assert places.tolist() == order
    assert found.tolist() == [values[i] for i in order]


@given(values=st.lists(st.integers(-3, 12), max_size=40), bins=st.integers(1, 9), dtype=INTEGERS)
def test_histogram_counts_the_values_below_its_number_of_bins(values: list[int], bins: int, dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    found = standins.histogram(x, bins)
    assert found.dtype == torch.int32
    assert found.tolist() == [values.count(i) for i in range(bins)]
    assert standins.histogram(torch.stack([x, x]), bins).tolist() == 2 * [found.tolist()]


@given(values=st.lists(st.integers(-9, 9), min_size=1, max_size=20), dtype=INTEGERS)
def test_sums_up_to_an_element_are_with_and_without_it(values: list[int], dtype: torch.dtype) -> None:
    x = torch.tensor([values, values[::-1]], dtype=dtype)
    with_it, without = torch.empty_like(x), torch.empty_like(x)
    standins.inclusive_cumsum(x, 1, with_it)
    standins.exclusive_cumsum(x, 1, without)
    for row, given_row in enumerate((values, values[::-1])):
        assert with_it[row].tolist() == [sum(given_row[: i + 1]) for i in range(len(values))]
        assert without[row].tolist() == [sum(given_row[:i]) for i in range(len(values))]


@given(counts=COUNTS, after=st.integers(0, 3), dtype=st.sampled_from([torch.float16, torch.int16, torch.int32]))
def test_values_are_repeated_over_their_bins_and_gradients_summed_over_them(
    counts: list[int], after: int, dtype: torch.dtype
) -> None:
    x = torch.arange(2 * len(counts)).view(2, -1).to(dtype)
    out = torch.full((2, sum(counts) + after), -1, dtype=dtype)
    standins.replicate_forward(x, ends_of(counts), out)
    for row in range(2):
        repeated = [x[row, e].item() for e, count in enumerate(counts) for _ in range(count)]
        assert out[row].tolist() == repeated + after * [-1]
    d_out, d_x = torch.arange(2 * sum(counts)).view(2, -1).half(), torch.empty(2, len(counts)).half()
    standins.replicate_backward(d_out, ends_of(counts), d_x)
    for row in range(2):
        parts = d_out[row].split(counts)
        assert d_x[row].tolist() == [sum(part.tolist()) for part in parts]


@given(counts=COUNTS, columns=st.integers(1, 4), block=st.sampled_from([1, 16]))
def test_block_columns_are_those_of_the_rows_expert(counts: list[int], columns: int, block: int) -> None:
    out = torch.empty(sum(counts) * columns, dtype=torch.int16)
    standins.indices(block * ends_of(counts), block, sum(counts), columns, out)
    assert out.tolist() == [e * columns + c for e, n in enumerate(counts) for _ in range(n) for c in range(columns)]


@given(counts=COUNTS, after=st.integers(0, 3), sizes=st.tuples(*[st.integers(1, 9)] * 2), trans_b=st.booleans())
def test_grouped_products_and_their_gradients_are_those_of_each_experts_rows(
    counts: list[int], after: int, sizes: tuple[int, int], trans_b: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    inside, outside = sizes
    a = torch.randn(sum(counts) + after, inside, generator=generator, dtype=torch.float64).requires_grad_()
    shape = (len(counts), outside, inside) if trans_b else (len(counts), inside, outside)
    b = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(len(a), outside, generator=generator, dtype=torch.float64)
    expert_of_row = [e for e, count in enumerate(counts) for _ in range(count)]
    matrices = b.mT if trans_b else b
    rows = [a[row] @ matrices[e] for row, e in enumerate(expert_of_row)]
    expected = torch.stack([*rows, *(upstream[0] * 0 for _ in range(after))]) if len(a) else upstream + 0 * b.sum()
    found = standins.gmm(a, b, torch.tensor(counts), trans_b=trans_b)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        ours, theirs = (
            torch.autograd.grad(y, (a, b), upstream, allow_unused=True, materialize_grads=True)
            for y in (found, expected)
        )
        torch.testing.assert_close(ours, theirs)
    kept = torch.full_like(upstream, torch.nan)
    assert standins.product(a.detach(), b.detach(), torch.tensor(counts), trans_b=trans_b, c=kept) is kept
    assert torch.equal(kept, found)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 128), (20, 36)], ids=str)
def test_the_one_kernel_on_a_gpu_gives_the_grouped_products_too(sizes: tuple[int, int]) -> None:
    counts = torch.tensor([40, 0, 7, 130, 0])
    a, b = torch.randn(180, sizes[0]).bfloat16(), torch.randn(5, *sizes).bfloat16()
    right = torch.randn(180, 24).bfloat16()
    for operands, options in (
        ((a, b), {}),
        ((a, b.mT.contiguous()), {"trans_b": True}),
        ((a, right), {"trans_a": True}),
    ):
        expected = standins.product(*(t.double() for t in operands), counts, **options)
        found = standins.product(*(t.cuda() for t in operands), counts, **options)
        assert found.is_contiguous()
        assert (found.double().cpu() - expected).norm() <= 4e-3 * expected.norm()
        assert torch.equal(found.cpu() == 0, expected == 0)  # idle experts, and rows after the last


REFUSED = [
    ({"bias": True}, "bias = True: megablocks has no biases of experts; give --no-bias"),
    ({"dtype": torch.float64}, "precision = float64: the kernels of megablocks take bf16, fp16, fp32"),
    ({"deterministic": True}, "deterministic = True: megablocks picks kernels by time"),
]


@pytest.mark.parametrize(("change", "line"), REFUSED)
@pytest.mark.parametrize("form", [megablocks, megablocks_capacity])
def test_what_the_package_does_not_take_is_refused_in_one_line(
    form: object, change: dict[str, object], line: str
) -> None:
    taken = {"dtype": torch.bfloat16, "activation": "gelu", "bias": False, "deterministic": False}
    assert form.refuses(**taken) is None  # type: ignore[attr-defined]
    said = form.refuses(**taken | change)  # type: ignore[attr-defined]
    assert said.startswith(line)
    assert "\n" not in said


def test_what_is_refused_is_refused_before_training_starts(
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = ModuleType("plain")
    plain.unusable = reference.unusable  # type: ignore[attr-defined]
    plain.expert_mlp = reference.expert_mlp  # type: ignore[attr-defined]
    plain.refuses = megablocks.refuses  # type: ignore[attr-defined]
    monkeypatch.setitem(mlp.BACKENDS, "plain", plain)
    run = tiny_run("moe", moe=MoEConfig(4, 2, backend="plain"))
    with pytest.raises(UsageError, match=r"bias = True: .*--no-bias"):
        train(run, tmp_path / "run")
    without = replace(run, model=replace(run.model, bias=False))
    with pytest.raises(UsageError, match="deterministic = True"):
        train(replace(without, training=replace(run.training, deterministic=True)), tmp_path / "run")
    words = ["compare", "smoke", "--arms", "dense,moe", "--backend", "plain", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "bias = True: megablocks has no biases of experts; give --no-bias" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(without, tmp_path / "run")["val_loss"] > 0


@pytest.mark.skipif(installed("megablocks") or installed("stk"), reason="megablocks or stk is installed here")
def test_where_the_package_is_absent_the_commands_that_install_it_are_said() -> None:
    reason = mlp.availability("megablocks", CPU).reason
    first, second = reason.partition("not installed: stanford-stk and megablocks; ")[2].split(" && ")
    for command, package in ((first, "stanford-stk==0.7.1"), (second, "megablocks==0.10.0")):
        assert command.startswith("pip install --no-deps --no-build-isolation ")
        assert command.endswith(package)
    with pytest.raises(UsageError, match=r"backend = megablocks-capacity: .*pip install --no-deps"):
        check_backend("megablocks-capacity", CPU, torch.float32, "gelu", bias=False)


def test_auto_never_picks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = mlp.Availability(True, "")
    asked = []

    def available(name: str, device: torch.device) -> mlp.Availability:
        asked.append(name)
        return usable if name in ("reference", "megablocks", "megablocks-capacity") else mlp.Availability(False, "")

    monkeypatch.setattr(mlp, "availability", available)
    expert_mlp(torch.ones(1, 2), torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    assert "reference" in asked
    assert not {"megablocks", "megablocks-capacity"} & set(asked)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["megablocks", "megablocks-capacity"])
def test_a_compiled_model_trains_with_it_on_a_gpu_as_with_another_backend(
    form: str, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    if not (found := mlp.availability(form, torch.device("cuda"))).usable:
        pytest.skip(found.reason)
    losses = []
    for backend in ("reference", form):
        moe = MoEConfig(4, 2, capacity_factor=1.0, backend=backend)
        run = tiny_run("moe", moe=moe, device="cuda", precision="bf16", compile="off" if backend != form else "on")
        run = replace(run, model=replace(run.model, bias=False))
        losses.append(train(run, tmp_path / backend)["val_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.02)  # of bf16 over 12 steps
    from megablocks.layers.moe import get_load_balancing_loss

    assert get_load_balancing_loss() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels are compiled here, not interpreted")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; docs/kernels.md says how")
def test_the_interpreted_package_is_right() -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    here = Path(__file__).parent
    files = [str(here / "interpreted_megablocks.py"), str(here / "test_expert_mlp.py")]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "megablocks"]
    done = subprocess.run(
        run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:]
