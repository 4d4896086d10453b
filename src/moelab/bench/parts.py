"""Where the time of a training step goes: attention, experts, head, optimizer, and what is left.

The halves of the blocks and the loss are compiled each by itself, and a clock stands between them, in the forward pass
and, by hooks on their outputs, in the backward pass. On a GPU the clock is a CUDA event, which a captured step has as a
node of its own: what the host does has no part in it. What is fused across the halves' bounds in a block that is
compiled whole is not fused here, so these are shares, not times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moelab.config import TrainingConfig
from moelab.device import synchronize
from moelab.model import GPT
from moelab.model.gpt import Block
from moelab.training.batches import Batches
from moelab.training.step import Step

PARTS = ("attention", "experts", "head", "optimizer", "other")
TIMES = 5  # a part's time is the median of so many steps'


class Timeline:
    """Moments from which on the time belongs to a part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[tuple[str, Any]] = []

    def at(self, part: str) -> None:
        """Ends the part before."""
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True, external=True)
            moment.record()
            self.moments.append((part, moment))
        else:
            self.moments.append((part, time.perf_counter()))

    def spent(self) -> dict[str, float]:
        """Milliseconds of each part."""
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, begun), (_, ended) in zip(self.moments, self.moments[1:], strict=False):
            spent[part] += begun.elapsed_time(ended) if self.device.type == "cuda" else (ended - begun) * 1e3
        return spent


class TimedStep(Step):
    """A step that tells how long its parts take.

    Args:
        model: on its device; its halves are compiled where `config` would have it compiled.
        config: how it is trained.
        batches: how a step's sequences are cut.
        captured: whether the step is a CUDA graph.
    """

    def __init__(self, model: GPT, config: TrainingConfig, batches: Batches, captured: bool) -> None:
        super().__init__(model, replace(config, compile="off", capture="on" if captured else "off"), batches)
        self.timeline = Timeline(self.device)
        compiled = config.compiles(self.device.type)
        if compiled:
            torch.compiler.reset()
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            attend = self._timed("attention", block.attend, compiled, first=number == 0)
            block.attend = attend  # type: ignore[method-assign]
            block.feed = self._timed("experts", block.feed, compiled)  # type: ignore[method-assign]
        model.loss = self._timed("head", model.loss, compiled)  # type: ignore[method-assign]
        self.optimizer.register_step_pre_hook(lambda *_: self.timeline.at("optimizer"))
        self.optimizer.register_step_post_hook(lambda *_: self.timeline.at("other"))

    def parts(self, windows: torch.Tensor) -> dict[str, float]:
        """The share of each part in a step on `windows`; together 1."""
        self.prepare(windows)
        found = []
        for _ in range(TIMES):
            self(windows)
            synchronize(self.device)
            found.append(self.timeline.spent())
        spent = {part: sorted(one[part] for one in found)[TIMES // 2] for part in PARTS}
        return {part: ms / sum(spent.values()) for part, ms in spent.items()}

    def _run(self, windows: torch.Tensor) -> None:
        self.timeline.moments.clear()
        self.timeline.at("other")
        super()._run(windows)
        self.timeline.at("other")

    def _timed(self, part: str, half: Callable[..., Any], compiled: bool, first: bool = False) -> Callable[..., Any]:
        """`half`, whose time is the part's; the first one's input ends the part in the backward pass."""
        half = torch.compile(half) if compiled else half

        def timed(x: torch.Tensor, *rest: Any) -> Any:
            if first and x.requires_grad:
                x.register_hook(lambda _: self.timeline.at("other"))
            self.timeline.at(part)
            out = half(x, *rest)
            self.timeline.at("other")
            y = out[0] if isinstance(out, tuple) else out
            if y.requires_grad:
                y.register_hook(lambda _: self.timeline.at(part))
            return out

        return timed
