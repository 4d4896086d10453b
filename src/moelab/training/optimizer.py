"""AdamW over a GPT's parameters, with its state in fp32, bf16 or 8 bits, and the learning rate of a step.

The state is two numbers a parameter: 8 bytes in fp32, 4 in bf16, a little over 2 in 8 bits. Parameters and their update
are fp32 whatever the state.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moelab.config import TrainingConfig, UsageError
from moelab.experts import triton as triton_backend


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only.

    A matrix is a parameter with two or more axes, embeddings and the (E, F, D) experts included, except the experts'
    (E, F) and (E, D) biases; vectors (biases, norms) are not decayed. Each parameter is in exactly one group.
    With fp32 state it is PyTorch's fused kernel, which CPUs have too, except on devices without one; bf16 state is
    `AdamWBf16`, and 8-bit state torchao's.

    Raises:
        UsageError: 8-bit state without torchao.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        is_vector = parameter.ndim < 2 or leaf == "bias" or leaf.startswith("b_")
        (vectors if is_vector else matrices).append(parameter)
    grouped = [id(p) for p in matrices + vectors]
    assert len(grouped) == len(set(grouped)), "a parameter in two groups"
    assert set(grouped) == {id(p) for p in model.parameters()}, "a parameter in no group"
    device = next(model.parameters()).device
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    match config.optimizer_state:
        case "bf16":
            return AdamWBf16(groups, **settings)
        case "8bit":
            return _adamw_8bit(groups, settings, compiled=device.type == "cuda" and config.compile != "off")
    return _adamw_fp32(groups, settings, device)


def parts(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that a moment is made of, by what stands behind its name: itself, or codes and their scales."""
    flatten = getattr(value, "__tensor_flatten__", None)  # of PyTorch's protocol for tensors made of tensors
    return {"": value} if flatten is None else {f".{part}": getattr(value, part) for part in flatten()[0]}


@torch.no_grad()
def rehearse(optimizer: torch.optim.Optimizer) -> None:
    """Runs a step's kernels once, each parameter's by itself, and puts back to the bit what they changed.

    A kernel that is compiled or loaded at its first use would else be so while a CUDA graph is captured. Of memory it
    takes a gradient and a copy of one parameter and its state.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            held = [p, *(tensor for value in optimizer.state[p].values() for tensor in parts(value).values())]
            kept = [tensor.clone() for tensor in held]
            p.grad = torch.zeros_like(p)
            optimizer.step()
            p.grad = None
            for tensor, before in zip(held, kept, strict=True):
                tensor.copy_(before)


def check_optimizer_state(state: str) -> None:
    """Raises `UsageError` if an optimizer with such state cannot be made here."""
    if state == "8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError("optimizer-state = 8bit: needs torchao; pip install 'moelab[8bit]', or give bf16 or fp32")


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine down to `min_learning_rate` at the last step."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def _adamw_fp32(groups: list[dict[str, Any]], settings: dict[str, Any], device: torch.device) -> torch.optim.Optimizer:
    """PyTorch's AdamW, whose state is made at once: made by the first step it would be zeroed at each replay of one."""
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(groups, fused=fused, capturable=device.type == "cuda", **settings)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return optimizer


class AdamWBf16(torch.optim.Optimizer):
    """AdamW of fp32 parameters whose mean and mean square of the gradient are kept in bf16.

    A step computes in fp32 from them, and its update uses the new ones before they are rounded: up or down by chance,
    in proportion, since what is rounded to the nearest loses changes of less than half a unit for ever (Gupta et al.
    2015, section 3.2). The chance is a hash of the step and of the number's place, the same in every run.

    On GPUs it is one kernel a parameter. The count of steps, and a learning rate that is a tensor, stay on the device:
    a step can be captured in a CUDA graph.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for p in group["params"]:
                moments = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in range(2))
                self.state[p] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
                self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            torch._foreach_add_([self.state[p]["step"] for p in moved], 1)
            rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=moved[0].device)
            rest = (*group["betas"], group["eps"], group["weight_decay"])
            for p in moved:
                by_kernel = p.is_cuda and triton_backend.unusable(p.device) is None
                update = update_by_kernel if by_kernel else update_by_operators
                state = self.state[p]
                update(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], rate, *rest)


def update_by_operators(
    p: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    step: torch.Tensor, rate: torch.Tensor, beta1: float, beta2: float, epsilon: float, decay: float,
) -> None:  # fmt: skip
    """One step of fp32 p in place, from fp32 grad and the bf16 moments, which move too; step counts from 1."""
    mean = exp_avg.float().lerp_(grad, 1 - beta1)
    square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    place = torch.arange(p.numel(), device=p.device).view_as(p)
    chance = scattered((place + step.long() * 0x9E3779B9) & MASK)
    exp_avg.copy_(rounded(mean, chance & 0xFFFF))
    exp_avg_sq.copy_(rounded(square, chance >> 16))
    p.mul_(1 - rate * decay)
    p.sub_(rate / (1 - beta1**step) * mean / (square.sqrt_() / (1 - beta2**step).sqrt() + epsilon))


MASK = 0xFFFFFFFF


def scattered(x: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits, in int64: lowbias32 (Wellons 2018, "Prospecting for Hash Functions")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def rounded(x: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """fp32 → bf16, up with the probability of the part that is cut off, where `chance` is uniform from 0 to 65,535."""
    bits = x.contiguous().view(torch.int32) + chance.to(torch.int32)
    return (bits & -0x10000).view(torch.float32).bfloat16()


def update_by_kernel(
    p: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    step: torch.Tensor, rate: torch.Tensor, beta1: float, beta2: float, epsilon: float, decay: float,
) -> None:  # fmt: skip
    """`update_by_operators` in one pass over memory."""
    from moelab.training import optimizer_kernels as kernels

    size, block = p.numel(), 2048
    kernels.adamw[(-(-size // block),)](
        p, grad.contiguous(), exp_avg, exp_avg_sq, step, rate, size, beta1, beta2, epsilon, decay, BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def _adamw_8bit(groups: list[dict[str, Any]], settings: dict[str, Any], compiled: bool) -> torch.optim.Optimizer:
    """torchao's AdamW with both moments in 8 bits, blocks of 256 sharing a scale (Dettmers et al. 2022).

    Parameters of less than 4,096 numbers, or of a number of them that 256 does not divide, keep fp32 moments. Unlike
    there, state is made at once, for a checkpoint to be read into, and the count of steps and the learning rate are on
    the parameters' device, for a step to be captured.
    """
    check_optimizer_state("8bit")
    from torchao.optim import AdamW8bit

    class AdamW(AdamW8bit):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(groups, **settings)
            for group in self.param_groups:
                group["lr"] = group["lr"].to(group["params"][0].device)
                self.rates = [group["lr"] for group in self.param_groups]
                for p in group["params"]:
                    self.state[p] = {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": self._new_buffer(p, True),
                        "exp_avg_sq": self._new_buffer(p, False),
                    }

        def step(self, closure: Callable[[], float] | None = None) -> None:
            given = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, self.rates, strict=True):
                if not isinstance(group["lr"], torch.Tensor):
                    group["lr"] = rate.fill_(group["lr"])
            with torch.compiler.set_stance("default" if compiled else "force_eager"):
                super().step(closure)
            for group, rate in zip(self.param_groups, given, strict=True):
                group["lr"] = rate

    return AdamW()
