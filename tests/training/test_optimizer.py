"""AdamW's groups and the learning rate."""

import importlib.util
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import ModelConfig, MoEConfig, TrainingConfig, UsageError
from moelab.model import GPT
from moelab.presets import arm_model
from moelab.training.optimizer import (
    AdamW,
    check_optimizer_state,
    clip_gradients,
    learning_rate,
    long_warmup,
    make_optimizer,
    parts,
    rehearse,
    rounded,
    scattered,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("arm", ["dense", "moe"])
def test_only_matrices_are_decayed_and_each_parameter_is_in_one_group(arm: str) -> None:
    model = GPT(arm_model(arm, ModelConfig(layers=2, heads=2, width=16, context=8, vocabulary=64), MoEConfig(4)))
    matrices, vectors = make_optimizer(model, TrainingConfig()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (matrices, vectors))
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    is_vector = {n for n in names.values() if "norm" in n or n.rsplit(".", 1)[-1].startswith("b")}
    assert kept == is_vector


def test_a_step_equals_adamw_written_out() -> None:
    config = TrainingConfig(learning_rate=0.01, min_learning_rate=0.0, weight_decay=0.1)
    model = torch.nn.Linear(3, 2)
    before, optimizer = model.weight.detach().clone().double(), make_optimizer(model, config)
    gradient = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2)
    optimizer.step()
    g = gradient.double()  # after one step the bias-corrected moments are g and g²
    expected = before * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(model.weight.double(), expected, rtol=1e-6, atol=1e-7)


@given(steps=st.integers(1, 300), warmup=st.integers(0, 400))
def test_learning_rate_warms_up_then_falls_to_the_minimum(steps: int, warmup: int) -> None:
    config = TrainingConfig(steps=steps, warmup_steps=warmup, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(steps)]
    top = min(warmup, steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if steps - top > 1:
        assert rates[-1] == pytest.approx(0.1)
        middle = top + (steps - 1 - top) / 2
        if middle.is_integer():
            assert rates[int(middle)] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)


@pytest.mark.parametrize(
    ("steps", "warmup", "given"), [(300, 500, 30), (300, 300, 30), (300, 299, None), (5, 5, 0), (1, 0, None)]
)
def test_a_warm_up_that_does_not_end_is_said_with_one_that_does(steps: int, warmup: int, given: int | None) -> None:
    line = long_warmup(TrainingConfig(steps=steps, warmup_steps=warmup))
    if given is None:
        assert line is None
        return
    ends = f"with steps = {steps} the learning rate only rises; give --warmup-steps {given}"
    assert line == f"warmup-steps = {warmup}: {ends}"
    assert long_warmup(TrainingConfig(steps=steps, warmup_steps=given)) is None


STATES = [
    pytest.param(
        state,
        marks=pytest.mark.skipif(
            state == "8bit" and importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
        ),
    )
    for state in ("fp32", "bf16", "8bit")
]


def walked(state: str, steps: int = 60, device: str = "cpu") -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A layer that was moved towards a target, of sizes that 8 bits take and that they do not."""
    config = TrainingConfig(learning_rate=0.01, optimizer_state=state)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(64, 128)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    target = [torch.randn(p.shape, generator=g).to(device) for p in model.parameters()]
    model = model.to(device)
    optimizer = make_optimizer(model, config)
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01 * (1 - number / 100)
        for p, goal in zip(model.parameters(), target, strict=True):
            noise = torch.randn(p.shape, generator=g).to(device)
            p.grad = p.detach() - goal + 0.1 * noise
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("state", STATES)
def test_every_state_walks_as_fp32_does(state: str) -> None:
    """Within the rounding of its moments: 1/256 in bf16, and a few percent in 8 bits."""
    (model, _), (exact, _) = walked(state), walked("fp32")
    start, _ = walked("fp32", steps=0)
    for p, right, begun in zip(model.parameters(), exact.parameters(), start.parameters(), strict=True):
        way = (right - begun).norm()
        assert way > 1
        assert ((p - right).norm() / way).item() <= {"fp32": 0, "bf16": 5e-3, "8bit": 0.05}[state]


@pytest.mark.parametrize("state", STATES)
def test_a_state_takes_the_bytes_that_it_promises(state: str) -> None:
    model, optimizer = walked(state, steps=1)
    taken = 0
    for name in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[model.weight][name]
        parts = (value.codes, value.scale) if hasattr(value, "codes") else (value,)
        taken += sum(t.nbytes for t in parts)
    assert taken <= {"fp32": 8, "bf16": 4, "8bit": 2.1}[state] * model.weight.numel()


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.98, 0.99])
def test_moments_in_bf16_come_to_what_they_are_of_on_average(beta: float) -> None:
    """Rounded to the nearest the mean square would end at 0.98, 0.96, 0.91 and 0.80."""
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = AdamW([{"params": [p], "weight_decay": 0.0}], 0.0, (beta, beta), 1e-8, torch.bfloat16)
    for _ in range(round(10 / (1 - beta))):  # until 5e-5 are missing
        p.grad = torch.ones_like(p)
        optimizer.step()
    for moment in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[p][moment].float()
        assert value.mean().item() == pytest.approx(1, abs=2e-3)
        assert value.std().item() < 0.02


def test_rounding_by_chance_takes_a_neighbour_in_proportion() -> None:
    x = torch.tensor([1.0, -1.0, 1 + 1 / 512, 3e-39, 0.0]).repeat_interleave(65_536)
    found = rounded(x, torch.arange(65_536).repeat(5)).float().view(5, -1)
    assert found[[0, 1, 4]].equal(x.view(5, -1)[[0, 1, 4]])  # what bf16 holds stays
    assert set(found[2].tolist()) == {1.0, 1 + 1 / 128}
    assert found[2].double().mean().item() == pytest.approx(1 + 1 / 512, abs=1e-6)
    assert not rounded(torch.tensor([math.inf, -math.inf]), torch.tensor([65_535, 65_535])).isfinite().any()


def test_the_hash_is_even_over_its_bits() -> None:
    values = scattered(torch.arange(100_000))
    assert len(set(values.tolist())) == 100_000
    for bit in range(32):
        assert ((values >> bit) & 1).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_bf16_state_is_the_formula_with_rounded_moments() -> None:
    beta1, beta2, rate, decay = 0.9, 0.95, 0.02, 0.1
    g = torch.Generator().manual_seed(0)
    p = torch.randn(500, generator=g)
    mine = torch.nn.Parameter(p.clone())
    optimizer = AdamW([{"params": [mine], "weight_decay": decay}], rate, (beta1, beta2), 1e-8, torch.bfloat16)
    right, mean, square = p.double(), torch.zeros(500).double(), torch.zeros(500).double()
    for step in range(1, 6):
        grad = torch.randn(500, generator=g)
        mine.grad = grad
        optimizer.step()
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad.double() ** 2
        right = right * (1 - rate * decay)
        right -= rate * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + 1e-8)
        state = optimizer.state[mine]
        for kept, exact in ((state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            assert ((kept.double() - exact).abs() <= exact.abs() / 127).all()  # one of the two neighbours
        mean, square = state["exp_avg"].double(), state["exp_avg_sq"].double()
        torch.testing.assert_close(mine.detach().double(), right, rtol=1e-5, atol=2e-4)  # a moment on the other side


def test_a_decay_that_bf16_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match=r"beta2 = 0.999: optimizer-state bf16 is too coarse for it"):
        TrainingConfig(optimizer_state="bf16", beta2=0.999)


def test_8_bits_without_torchao_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"needs torchao; pip install 'moelab\[8bit\]'"):
        check_optimizer_state("8bit")


WITH_KERNEL = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="test_triton.py has it interpreted")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


def stepped(moments: torch.dtype, betas: tuple[float, float], device: str, by_kernel: bool) -> list[torch.Tensor]:
    """Parameters, then moments, after clipped steps, one of them with a gradient that is not finite.

    Of one number, of a part of a block, of several blocks and a part, of a whole span, of spans and a part; one has no
    gradient, one has one that is not contiguous, and one from an odd address on.
    """
    g = torch.Generator().manual_seed(0)
    sizes = [(1,), (7,), (50, 100), (2, 4096), (33, 3), (63,), (3, 5000)]
    made = [torch.nn.Parameter(torch.randn(s, generator=g).to(device)) for s in sizes]
    groups = [{"params": made[:2], "weight_decay": 0.0}, {"params": made[2:], "weight_decay": 0.1}]
    optimizer = AdamW(groups, 1e-2, betas, 1e-8, moments)
    assert (optimizer.launches is None) == (device == "cpu" and not INTERPRETED)
    if not by_kernel:
        optimizer.launches = None
    for launch in optimizer.launches or ():
        assert launch.BLOCK * launch.BLOCKS == 8192  # of the sizes
    for number in range(4):
        for p in made:
            p.grad = torch.randn(p.shape, generator=g).to(device)
        made[4].grad = torch.randn(3, 33, generator=g).to(device).T
        made[5].grad = torch.randn(64, generator=g).to(device)[1:]
        if number == 2:
            made[2].grad = None
        optimizer.factor = torch.tensor(0.3 + number, device=device)
        if number != 3:
            optimizer.step()
        elif by_kernel:
            optimizer.found_inf = torch.ones((), device=device)
            optimizer.step()
            del optimizer.found_inf
    counts = [optimizer.state[p]["step"] for p in made]
    assert [count.item() for count in counts] == [3, 3, 2, 3, 3, 3, 3]
    names = ("exp_avg", "exp_avg_sq")
    return [t.detach().cpu() for t in (*made, *(optimizer.state[p][name] for name in names for p in made))]


@WITH_KERNEL
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.999)])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_does_as_the_operators(moments: torch.dtype, betas: tuple[float, float], device: str) -> None:
    found, right = (stepped(moments, betas, device, by_kernel) for by_kernel in (True, False))
    for one, other in zip(found, right, strict=True):
        assert one.dtype == other.dtype
        if one.dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(one, other, rtol=1 / 100, atol=1e-30)  # the last bit, where a product was fused
            assert (one == other).float().mean() >= 0.98 or one.numel() < 50  # the same chance


@WITH_KERNEL
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_fp32_state_is_pytorchs_adamw_in_float64(betas: tuple[float, float], device: str) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, 1000, generator=g)
    p, exact = torch.nn.Parameter(start.to(device, copy=True)), torch.nn.Parameter(start.double())
    mine = AdamW([{"params": [p], "weight_decay": 0.1}], 1e-2, betas, 1e-8, torch.float32)
    right = torch.optim.AdamW([exact], 1e-2, betas, 1e-8, weight_decay=0.1)
    for _ in range(10):
        gradient = torch.randn(start.shape, generator=g)
        p.grad, exact.grad = gradient.to(device), gradient.double() * min(1.0, 1 / (gradient.double().norm() + 1e-6))
        norm = clip_gradients([p], mine, 1.0)
        assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-5)
        mine.step()
        right.step()
    moved = exact.detach() - start
    assert ((p.detach().cpu() - start - moved).norm() / moved.norm()).item() <= 1e-5


@pytest.mark.parametrize("most", [0.0, 0.1, 1e9])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_a_clipped_step_is_that_of_the_scaled_gradient(state: str, most: float) -> None:
    ways = []
    for first in (True, False):
        model, optimizer = walked(state, steps=2)
        for p in model.parameters():
            assert p.grad is not None
        if first:
            clip_gradients(model.parameters(), optimizer, most)
        elif most:
            torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
        ways.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("state", STATES)
def test_every_state_walks_alike_on_a_gpu(state: str) -> None:
    (model, _), (exact, _) = walked(state, device="cuda"), walked("fp32")
    start, _ = walked("fp32", steps=0)
    for p, right, begun in zip(model.parameters(), exact.parameters(), start.parameters(), strict=True):
        assert ((p.cpu() - right).norm() / (right - begun).norm()).item() <= 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("state", STATES)
def test_a_captured_step_counts_on(state: str) -> None:
    """The learning rate is a tensor on the device there, and the count of steps too: a replay does what a call does."""
    outcomes = []
    for captured in (False, True):
        model, optimizer = walked(state, steps=3, device="cuda")
        rate = torch.tensor(0.01, device="cuda")
        for group in optimizer.param_groups:
            group["lr"] = rate
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
            if isinstance(optimizer, AdamW):
                optimizer.settle()
        for number in range(4):
            rate.fill_(0.01 / (1 + number))
            graph.replay() if captured else optimizer.step()
        outcomes.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("state", STATES)
def test_a_rehearsal_leaves_everything_as_it_was_to_the_bit(state: str) -> None:
    model, optimizer = walked(state, steps=3)

    def snapshot() -> list[torch.Tensor]:
        moments = (value for p in model.parameters() for value in optimizer.state[p].values())
        return [t.detach().clone() for t in (*model.parameters(), *(t for m in moments for t in parts(m).values()))]

    before = snapshot()
    for p in model.parameters():
        p.grad = None
    rehearse(optimizer)
    assert all(torch.equal(one, other) for one, other in zip(snapshot(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
