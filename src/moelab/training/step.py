"""One optimizer step, from the tokens to the new weights, in a form that a CUDA graph can hold whole.

Forward and backward passes of all micro-batches, clipping, the learning rate, AdamW, the routers' biases and the
figures for the metrics: all of it stays on the device, in tensors that stay where they are. Captured, a step costs the
host one copy and one launch; what is not captured runs the same code, kernel by kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from moelab.config import TrainingConfig
from moelab.device import synchronize
from moelab.model import GPT
from moelab.model.gpt import Output
from moelab.training.balance import Balancer
from moelab.training.batches import Batches
from moelab.training.checkpoint import Progress
from moelab.training.optimizer import learning_rate, make_optimizer
from moelab.training.window import Window


class Step:
    """The training of a model, a step at a call.

    Args:
        model: on its device.
        config: how it is trained.
        batches: how a step's sequences are cut into micro-batches.
    """

    def __init__(self, model: GPT, config: TrainingConfig, batches: Batches) -> None:
        self.model, self.config, self.batches = model, config, batches
        self.device = model.token_embedding.device
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=model.dtype == torch.float16)
        self.balancer = Balancer(model)
        self.window = Window(model.config, config.accumulation, min(config.log_interval, config.steps), self.device)
        # A fused kernel reads a rate of fp32 on a GPU, and on a CPU the number that the formula gave.
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        rates = [learning_rate(step, config) for step in range(config.steps)]
        self.rates = torch.tensor(rates, dtype=wide, device=self.device)
        self.rate = torch.zeros((), dtype=wide, device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.done = torch.zeros((), dtype=torch.int64, device=self.device)
        compiled = config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda")
        if compiled:
            torch.compiler.reset()  # or the runs of a comparison would use up one limit of recompilations between them
        self.forward: Callable[..., Any] = torch.compile(model) if compiled else model

    def go_on_from(self, progress: Progress) -> None:
        """Takes up where a checkpoint, whose tensors are in the model and the optimizer, was made."""
        self.done.fill_(progress.step)
        if progress.loss_scale is not None and self.scaler.is_enabled():
            self.scaler.load_state_dict(progress.loss_scale)

    def prepare(self, windows: torch.Tensor) -> None:
        """Compiles and picks kernels on a step's sequences; changes nothing that training goes by."""
        self._learn(*next(self.batches.micro_batches(windows)))
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)

    def __call__(self, windows: torch.Tensor) -> None:
        """Trains on (sequences of a step, context + 1) int64, on the model's device."""
        self._run(windows)

    def _run(self, windows: torch.Tensor) -> None:
        self.rate.copy_(self.rates.take(self.done))
        loss = torch.zeros((), device=self.device)
        for ids, targets in self.batches.micro_batches(windows):
            out = self._learn(ids, targets)
            if out.expert_counts is not None:
                self.balancer.add(out.expert_counts)
            self.window.add(out)
            assert out.loss is not None
            loss += out.loss.detach() / self.config.accumulation
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.step()
        self.window.end_step(loss, norm)
        self.done += 1

    def _learn(self, ids: torch.Tensor, targets: torch.Tensor) -> Output:
        """Adds a micro-batch's gradients."""
        out: Output = self.forward(ids, targets)
        loss, moe = out.loss, self.model.config.moe
        assert loss is not None
        if moe is not None:
            loss = loss + moe.balance_loss * out.balance_loss + moe.z_loss * out.z_loss
        self.scaler.scale(loss / self.config.accumulation).backward()
        return out
