"""A backend that gives wrong answers, or none, is found out before anything is built on it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelab.config import UsageError
from moelab.experts import check_backend, cuda, expert_mlp, mlp, reference, self_check, triton
from moelab.experts.choice import Shape

CPU = torch.device("cpu")


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> ModuleType:
    """The reference with something done to its output."""
    made = ModuleType("changed")
    made.unusable = lambda device: None  # type: ignore[attr-defined]
    made.expert_mlp = lambda *inputs: change(reference.expert_mlp(*inputs))  # type: ignore[attr-defined]
    return made


def refuse(y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nand a second line")


WRONG: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "output": (lambda y: y * 1.1, "a trial call in float32 gave a wrong output, 0.1 off"),
    "NaN": (lambda y: torch.full_like(y, torch.nan) + y, "gave a wrong output, nan off"),
    "gradient": (lambda y: y.detach() + 0.5 * (y - y.detach()), "gave a wrong gradient of x, 0.5 off"),
    "bf16 only": (lambda y: y if y.dtype == torch.float32 else -y, "a trial call in bfloat16 gave a wrong output"),
    "failing": (refuse, "a trial call in float32 failed (no kernel image is available)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_backend_is_said_in_one_line(case: str) -> None:
    change, line = WRONG[case]
    said = self_check.failure(changed(change), CPU)
    assert said is not None
    assert line in said
    assert "\n" not in said


def test_a_backend_that_is_right_passes() -> None:
    assert self_check.failure(changed(lambda y: y.clone()), CPU) is None


def test_a_backend_is_tried_within_what_it_takes() -> None:
    made, calls = changed(lambda y: y.clone()), []

    def expert_mlp(x, weights, indices, w_in, w_out, b_in, b_out, activation):  # type: ignore[no-untyped-def]
        calls.append((x.dtype, b_in))
        return reference.expert_mlp(x, weights, indices, w_in, w_out, b_in, b_out, activation)

    made.expert_mlp = expert_mlp  # type: ignore[attr-defined]
    made.refuses = (  # type: ignore[attr-defined]
        lambda dtype, activation, bias, deterministic: "no" if bias or dtype == torch.float32 else None
    )
    assert self_check.failure(made, CPU) is None
    assert calls == [(torch.bfloat16, None)]


def test_auto_passes_over_a_backend_that_is_wrong_and_asking_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mlp.BACKENDS, "grouped_mm", changed(lambda y: 2 * y))
    with pytest.raises(UsageError, match="backend = grouped_mm: a trial call in float32 gave a wrong output"):
        check_backend("grouped_mm", CPU, torch.float32, "relu2", bias=False)
    x, w = torch.ones(3, 4), torch.ones(1, 4, 4)
    y = expert_mlp(x, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), w, w, activation="relu2")
    assert torch.equal(y, torch.full((3, 4), 64.0))  # (1·4)² times 4, which the wrong one doubles


def test_auto_says_so_where_no_backend_can_compute_such_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in mlp.BACKENDS:
        monkeypatch.setitem(mlp.BACKENDS, name, changed(lambda y: 2 * y))
    with pytest.raises(UsageError, match=r"backend = auto: none of .*reference computes such experts here"):
        mlp.choose_backend("auto", CPU, torch.float32, "gelu", bias=True, shape=Shape(8, 16, 4, 2))


def test_kernels_are_tried_with_rows_of_whole_16_bytes_in_16_bits() -> None:
    (trial,) = [trial for trial in cuda.TRIALS if trial.width % 8 == trial.hidden % 8 == 0]
    assert not trial.fp32


def test_every_tile_of_triton_is_tried_whole_and_in_the_inner_loop_of_its_sums() -> None:
    tried = {
        (name, triton.tile_of(name, torch.bfloat16, trial.width, trial.hidden, trial.activation))
        for trial in triton.TRIALS
        for name in triton.TILES
    }
    assert tried >= {(name, tile) for name, tiles in triton.TILES.items() for tile in tiles.values()}
    large = triton.TRIALS[-1]
    rows = large.tokens * self_check.TOP_K // (large.experts - 1)
    for name in ("in", "out"):
        tile = triton.tile_of(name, torch.bfloat16, large.width, large.hidden)
        assert rows > 2 * tile.depth
        assert rows % tile.depth
    assert rows > max(triton.tile_of(name, torch.bfloat16, 1024, 512).rows for name in ("up", "down", "slope", "back"))


def test_a_trial_in_16_bits_alone_finds_what_is_wrong_there() -> None:
    seen = []

    def change(y: torch.Tensor) -> torch.Tensor:
        seen.append((y.dtype, y.shape[1]))
        return y if y.shape[1] == 20 else -y

    made = changed(change)
    made.TRIALS = (self_check.SMALL, self_check.Trial(40, 128, 256, 3, fp32=False))  # type: ignore[attr-defined]
    assert "a trial call in bfloat16 gave a wrong output" in str(self_check.failure(made, CPU))
    assert seen == [(torch.float32, 20), (torch.bfloat16, 20), (torch.bfloat16, 128)]


def test_trying_a_backend_leaves_the_random_state_and_the_gradient_mode_alone() -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert self_check.failure(reference, CPU) is None
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_choice_of_a_backend_is_marked_as_pytorch_marks_a_constant() -> None:
    def other() -> None: ...

    marks = vars(torch.compiler.assume_constant_result(other))
    assert marks
    assert marks.items() <= vars(mlp._chosen).items()


def test_a_trial_is_not_part_of_what_its_first_call_stands_in() -> None:
    """Else the first call of a checkpointed block recomputes the trial's own backward pass, and the backend is out."""
    mlp._tried.cache_clear()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w_in, w_out = torch.ones(2, 4, 8), torch.ones(2, 8, 4)

    def block(x: torch.Tensor) -> torch.Tensor:
        return expert_mlp(x, torch.ones(6, 1), torch.arange(6)[:, None] % 2, w_in, w_out, backend="grouped_mm")

    checkpoint(block, x, use_reentrant=False).sum().backward()
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    assert mlp.availability("grouped_mm", CPU).usable
    torch.testing.assert_close(x.grad, expected)
