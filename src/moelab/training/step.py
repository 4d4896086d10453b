"""One optimizer step, from the tokens to the new weights, in a form that a CUDA graph can hold whole.

Forward and backward passes of all micro-batches, clipping, the learning rate, AdamW, the routers' biases and the
figures for the metrics: all of it stays on the device, in tensors that stay where they are. Captured, a step costs the
host one copy and one launch; what is not captured runs the same code, kernel by kernel.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from moelab.config import RunFailed, TrainingConfig, UsageError, first_line
from moelab.device import import_compiler, reset_peak_memory, synchronize
from moelab.experts import backend_of
from moelab.model import GPT
from moelab.model.gpt import Output
from moelab.training.balance import Balancer
from moelab.training.batches import Batches
from moelab.training.checkpoint import Progress
from moelab.training.optimizer import AdamW, clip_gradients, learning_rate, make_optimizer, rehearse
from moelab.training.window import Window


def check_capture(config: TrainingConfig, device: torch.device) -> None:
    """Raises `UsageError` if a step cannot be captured on a device and is to be."""
    if config.capture == "on" and device.type != "cuda":
        raise UsageError(f"capture = on: needs a CUDA device, and this run is on {device.type}; give auto or off")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one that steps are captured on: cuBLAS keeps workspaces for each stream that it was ever used on."""
    return torch.cuda.Stream(device)


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
        compiled = config.compiles(self.device.type)
        if compiled:
            import_compiler()
            torch.compiler.reset()  # or the runs of a comparison would use up one limit of recompilations between them
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
        self.forward: Callable[..., Any] = model.compiled() if compiled else model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.input = torch.empty(0)  # the windows of a captured step

    def go_on_from(self, progress: Progress) -> None:
        """Takes up where a checkpoint, whose tensors are in the model and the optimizer, was made."""
        self.done.fill_(progress.step)
        if progress.loss_scale is not None and self.scaler.is_enabled():
            self.scaler.load_state_dict(progress.loss_scale)

    def prepare(self, windows: torch.Tensor) -> str | None:
        """Compiles, picks kernels and, where that is wanted and can be, captures the step; trains nothing.

        Args:
            windows: of any step, as for a call.

        Returns:
            A line for the user where `capture` "auto" would have captured the step and cannot.

        Raises:
            UsageError: `capture` is "on", and part of the step waits for the host.
            RunFailed: the step could not be captured for a reason that only shows when it is tried.
        """
        if not self.config.captures(self.device.type):
            self._first_pass(windows)
            synchronize(self.device)
            return None
        # Not on the default stream: autograd would remember it for each parameter and leave the capture for it.
        stream = _side_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._first_pass(windows)
            waits = self._waits_for_host(windows)
            if waits is None:
                rehearse(self.optimizer)
                self.input = windows.clone()
        synchronize(self.device)
        if waits is None:
            self._capture(stream)
        elif self.config.capture == "on":
            raise UsageError(f"capture = on: {waits}; give auto or off")
        return waits and f"capture = auto: {waits}, so it is launched kernel by kernel"

    def __call__(self, windows: torch.Tensor) -> None:
        """Trains on (sequences of a step, context + 1) int64, on the model's device."""
        if self.graph is None:
            self._run(windows)
        else:
            self.input.copy_(windows)
            self.graph.replay()

    def release(self) -> None:
        """Gives back the memory of a captured step; a later call launches it kernel by kernel."""
        self.graph = None

    def _open_libraries(self) -> None:
        """Has cuBLAS take its workspaces, for this stream, of both threads: they stay where they are.

        Taken during a step they lie in the middle of what the head's logits were, and there is no whole block for the
        next.
        """
        if self.device.type == "cuda":
            one = torch.ones(64, 64, device=self.device, dtype=self.model.dtype, requires_grad=True)
            (one @ one).sum().backward()

    def _first_pass(self, windows: torch.Tensor) -> None:
        """Compiles; what that takes of memory beside the step, as where kernels are tried on copies, is not counted.

        Nor kept: a step would cut up what the trials left, and lack a whole block for the head's logits.
        """
        self._open_libraries()
        self._rehearse(windows)
        torch.cuda.empty_cache()
        reset_peak_memory(self.device)

    def _rehearse(self, windows: torch.Tensor) -> None:
        self._learn(*next(self.batches.micro_batches(windows)))
        self.optimizer.zero_grad(set_to_none=True)

    def _waits_for_host(self, windows: torch.Tensor) -> str | None:
        """What of the step waits for the device on the host, which no CUDA graph can hold; None if nothing does."""
        if self.scaler.is_enabled() and not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return f"with optimizer-state {self.config.optimizer_state} the loss scaling of fp16 waits for the host"
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does not find all that waits: the capture finds the rest
            torch.cuda.set_sync_debug_mode("error")
        try:
            self._rehearse(windows)
        except RuntimeError as problem:
            if "synchronizing CUDA operation" not in str(problem):
                raise
            self.optimizer.zero_grad(set_to_none=True)
            if self.model.config.moe is None:
                return "a step of this model waits for the host"
            deterministic = torch.are_deterministic_algorithms_enabled()
            backend = backend_of(self.model.config, self.device, self.model.dtype, deterministic).backend
            return f"a step of this model waits for the host (backend {backend})"
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return None

    def _capture(self, stream: torch.cuda.Stream) -> None:
        """Captures the step. Gradients and activations are in the graph's own memory, and new at each replay."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._run(self.input)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            line = first_line(problem)
            raise RunFailed(f"capture = {self.config.capture}: failed ({line}); give --capture off") from problem
        if isinstance(self.optimizer, AdamW):
            self.optimizer.settle()
        self.graph = graph

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
        norm = clip_gradients(self.model.parameters(), self.optimizer, self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.step(norm.isfinite() if self.scaler.is_enabled() else None)
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
