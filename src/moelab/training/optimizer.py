"""AdamW over a GPT's parameters, with its state in fp32, bf16 or 8 bits, and the learning rate of a step.

The state is two numbers a parameter: 8 bytes in fp32, 4 in bf16, a little over 2 in 8 bits. Parameters and their update
are fp32 whatever the state.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from moelab.config import TrainingConfig, UsageError
from moelab.experts import triton as triton_backend


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only.

    A matrix is a parameter with two or more axes, embeddings and the (E, F, D) experts included, except the experts'
    (E, F) and (E, D) biases; vectors (biases, norms) are not decayed. Each parameter is in exactly one group.
    With 8-bit state it is torchao's; on GPUs with Triton, and with bf16 state everywhere, `AdamW`; else PyTorch's,
    fused where there is such a kernel.

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
            return AdamW(groups, **settings, moments=torch.bfloat16)
        case "8bit":
            return _adamw_8bit(groups, settings, compiled=device.type == "cuda" and config.compile != "off")
    if device.type == "cuda" and triton_backend.unusable(device) is None:
        return AdamW(groups, **settings, moments=torch.float32)
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


def clip_gradients(parameters: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer, most: float) -> torch.Tensor:
    """Has the optimizer use gradients of which the norm is `most`, or less; 0 for any. → their norm () fp32 before.

    `AdamW` is given the factor for its step; for other optimizers the gradients are changed.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(optimizer, AdamW):
        optimizer.factor = (most / (norm + 1e-6)).clamp(max=1.0) if most else None
    elif most:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine down to `min_learning_rate` at the last step."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def long_warmup(config: TrainingConfig) -> str | None:
    """A line for the user where the learning rate only rises, and a warm-up that would not; None where it falls."""
    if config.warmup_steps < config.steps:
        return None
    return (
        f"warmup-steps = {config.warmup_steps}: with steps = {config.steps} the learning rate only rises; "
        f"give --warmup-steps {config.steps // 10}"
    )


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


class AdamW(torch.optim.Optimizer):
    """AdamW of fp32 parameters whose mean and mean square of the gradient are kept in fp32 or bf16.

    On GPUs a step is one kernel for each group of parameters, and one pass over memory: it reads gradients, parameters
    and moments and writes the last two, 28 bytes a parameter in fp32. Clipping is in that pass (`factor`).

    A step computes in fp32, and its update uses the new moments before they are rounded to bf16: up or down by chance,
    in proportion, since what is rounded to the nearest loses changes of less than half a unit for ever (Gupta et al.
    2015, section 3.2). The chance is a hash of the step and of the number's place, the same in every run.

    The count of steps and a learning rate that is a tensor stay on the device: a CUDA graph can hold a step, and does
    nothing until `settle` was called after its capture. It is to be the last one captured, and its gradients stay where
    they are.
    """

    factor: torch.Tensor | None = None
    """What the gradients are multiplied by before they are used, () fp32 on their device; 1 without it."""
    found_inf: torch.Tensor | None = None
    """Not 0: the step is to change nothing. `torch.amp.GradScaler` sets it."""
    _step_supports_amp_scaling = True

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, moments: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for p in group["params"]:
                kept = (torch.zeros_like(p, dtype=moments) for _ in range(2))
                self.state[p] = dict(zip(("exp_avg", "exp_avg_sq"), kept, strict=True))
                self.state[p]["step"] = torch.zeros((), device=p.device)
        device = self.param_groups[0]["params"][0].device
        by_kernel = triton_backend.unusable(device) is None
        self.launches = [_Launch(group["params"]) for group in self.param_groups] if by_kernel else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for number, group in enumerate(self.param_groups):
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            counts, device = [self.state[p]["step"] for p in moved], moved[0].device
            torch._foreach_add_(counts, 1)
            if self.found_inf is not None:
                torch._foreach_sub_(counts, [self.found_inf] * len(counts))
            rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
            factor = torch.ones((), device=device) if self.factor is None else self.factor
            rest = (*group["betas"], group["eps"], group["weight_decay"])
            if self.launches is not None:
                self.launches[number](self.state, rate, factor, self.found_inf, *rest)
                continue
            assert self.found_inf is None, "fp16 is trained on GPUs"
            for p in moved:
                state = self.state[p]
                assert p.grad is not None
                update_by_operators(
                    p, p.grad * factor, state["exp_avg"], state["exp_avg_sq"], state["step"], rate, *rest
                )

    def settle(self) -> None:
        """Writes down for the graph that has captured a step where the parameters and gradients are."""
        for launch in self.launches or ():
            launch.settle()


class _Launch:
    """`optimizer_kernels.adamw` for the parameters of one group, on one device, with its tables.

    Of a span of numbers the kernel finds the parameter, and of a parameter the addresses, in memory of the device. What
    a CUDA graph is to find there is known when it is captured, and written after that: copied by the graph itself, from
    the host, it cost up to 1 ms a step.
    """

    BLOCK, BLOCKS, WARPS = 1024, 8, 4  # numbers at once, and how many times, and the warps, of a program
    COLUMNS = 7  # addresses of the parameter, its gradient, moments and count of steps; its numbers; its first span

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters, device = parameters, parameters[0].device
        sizes, span = torch.tensor([p.numel() for p in parameters]), self.BLOCK * self.BLOCKS
        spans = (sizes + span - 1) // span
        self.sizes, self.firsts = sizes.tolist(), (spans.cumsum(0) - spans).tolist()
        self.owners = torch.repeat_interleave(torch.arange(len(parameters), dtype=torch.int32), spans).to(device)
        self.table = torch.zeros(len(parameters), self.COLUMNS, dtype=torch.int64, device=device)  # of a captured step
        self.awaited: torch.Tensor | None = None

    def __call__(
        self, states: dict[torch.Tensor, Any], rate: torch.Tensor, factor: torch.Tensor,
        found_inf: torch.Tensor | None, beta1: float, beta2: float, epsilon: float, decay: float,
    ) -> None:  # fmt: skip
        from moelab.training import optimizer_kernels as kernels

        gradients = [None if p.grad is None else _in_lines(p.grad) for p in self.parameters]
        rows = []
        for p, grad, size, first in zip(self.parameters, gradients, self.sizes, self.firsts, strict=True):
            state = states[p]
            moved = (p, p if grad is None else grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            rows.append([*(tensor.data_ptr() for tensor in moved), 0 if grad is None else size, first])
        table = torch.tensor(rows, dtype=torch.int64)
        if self.table.is_cuda and torch.cuda.is_current_stream_capturing():
            table, self.awaited = self.table, table
        kernels.adamw[(len(self.owners),)](
            table.to(self.table.device, non_blocking=True), self.owners, rate, factor, found_inf,
            1 - beta1, 1 - beta2, _log(beta1), _log(beta2), epsilon, decay,
            MOMENTS=kernels.TYPES[states[self.parameters[0]]["exp_avg"].dtype], COLUMNS=self.COLUMNS, BLOCK=self.BLOCK,
            BLOCKS=self.BLOCKS, LANES=32 * self.WARPS, num_warps=self.WARPS,
        )  # fmt: skip

    def settle(self) -> None:
        if self.awaited is not None:
            self.table.copy_(self.awaited)
            self.awaited = None


def _in_lines(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, contiguous and from an address of whole lines of 16 bytes on."""
    whole = gradient.contiguous()
    return whole.clone() if whole.data_ptr() % 16 else whole


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def update_by_operators(
    p: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    step: torch.Tensor, rate: torch.Tensor, beta1: float, beta2: float, epsilon: float, decay: float,
) -> None:  # fmt: skip
    """One step of fp32 p in place, from fp32 grad and fp32 or bf16 moments, which move too; step counts from 1."""
    mean = exp_avg.float().lerp_(grad, 1 - beta1)  # the moments themselves, if they are fp32
    square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if exp_avg.dtype == torch.bfloat16:
        place = torch.arange(p.numel(), device=p.device).view_as(p)
        chance = scattered((place + step.long() * 0x9E3779B9) & MASK)
        exp_avg.copy_(rounded(mean, chance & 0xFFFF))
        exp_avg_sq.copy_(rounded(square, chance >> 16))
    p.mul_(1 - rate * decay)
    p.sub_(rate / (1 - beta1**step) * mean / (square.sqrt() / (1 - beta2**step).sqrt() + epsilon))


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


def _adamw_8bit(groups: list[dict[str, Any]], settings: dict[str, Any], compiled: bool) -> torch.optim.Optimizer:
    """torchao's AdamW with both moments in 8 bits, blocks of 256 sharing a scale (Dettmers et al. 2022).

    Parameters of less than 4,096 numbers, or of a number of them that 256 does not divide, keep fp32 moments. Unlike
    there, state is made at once, for a checkpoint to be read into, and the count of steps and the learning rate are on
    the parameters' device, for a step to be captured.
    """
    check_optimizer_state("8bit")
    from torchao.optim import AdamW8bit

    class Captured(AdamW8bit):  # type: ignore[misc]
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

    return Captured()
