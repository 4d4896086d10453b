"""One MoE feed-forward, router included, forward and backward: every usable backend, and others' layers (`peers`),
beside the dense twin.

The dense twin is a feed-forward of hidden size K·F: the same active FLOPs without routing. All are timed in one run,
in turns, so that what disturbs the device disturbs them alike; a backend is timed when its output and gradients on the
very inputs that are timed agree with float64.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch
from torch import nn

from moelab.bench.clock import busy_ms, captured, peak_and_kept_mib, wall_ms
from moelab.bench.defaults import filled
from moelab.bench.peers import PEERS, peer_mlp
from moelab.config import Activation, ModelConfig, MoEConfig, Precision, UsageError, first_line, require
from moelab.device import compute_dtype, environment, keep_freed_memory, resolve_device
from moelab.experts.choice import device_class
from moelab.experts.mlp import BACKENDS, availability, expert_mlp
from moelab.model.feed_forward import FeedForward
from moelab.model.moe import Experts
from moelab.model.router import Router

Drawn = TypeVar("Drawn", bound=nn.Module)

TWIN = "dense twin"
TIPPED = 0.001  # the share of the tokens that rounding may send to other experts than float64 does, but for one token
PROFILED = (
    3  # rounds in which the kernels' time is taken too: a GPU that throttles is not the same from one to the next
)
NO_MEMORY = re.compile("out of memory|allocate memory|[Oo]verflow")  # on CPUs it is an error like others
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class LayerBench:
    """What is timed."""

    widths: tuple[int, ...] | None = None
    """Widths D; 256, 512, 768 and 1,024 on a GPU, 128 and 256 on a CPU when not given."""
    tokens: int | None = None
    """Tokens T; 32,768 on a GPU and 1,024 on a CPU when not given."""
    experts: int = 8
    """Experts E."""
    top_k: int = 2
    """Experts a token is sent to, K."""
    multiple: float = 4.0
    """Hidden size of an expert, F, as a multiple of D."""
    activation: Activation = "gelu"
    """Activation; gelu is the exact erf form."""
    bias: bool = False
    """Biases of the experts, and of the twin."""
    routing: str = "router"
    """Who gets the tokens: what a random router says, zipf:S (expert e in proportion to 1 / (e + 1)^S; zipf:0 is the
    even one that skews are to be set beside), or one-hot."""
    precision: Precision = "auto"
    """Arithmetic of the products."""
    backends: tuple[str, ...] = ()
    """Backends to time, and of other packages scattermoe and sonicmoe; all that are usable here when none is named."""
    rounds: int | None = None
    """Rounds, 7 on a GPU and 5 on a CPU when not given; medians are of all, or of the first 3 for a GPU's busy time."""
    steps: int | None = None
    """Steps of a round; 8 on a GPU and 4 on a CPU when not given."""
    device: str = "auto"
    """cuda, cuda:N or cpu."""

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "tokens", "rounds", "steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name.replace("_", "-"), value, "give 1 or more")
        require(self.top_k <= self.experts, "top-k", self.top_k, f"give 1 to {self.experts}, the number of experts")
        require(0 < self.multiple < math.inf, "multiple", self.multiple, "give more than 0")
        widths = self.widths
        sound = widths is None or (len(widths) > 0 and min(widths) >= 1)
        require(sound, "widths", widths, "give one or more, each 1 or more")
        _skew(self.routing)


@dataclass(frozen=True)
class FullLayerBench(LayerBench):
    """With nothing left to the device; the defaults are a GPU's."""

    widths: tuple[int, ...] = (256, 512, 768, 1024)
    tokens: int = 32_768
    rounds: int = 7
    steps: int = 8


SMALL_LAYERS = {"widths": (128, 256), "tokens": 1_024, "rounds": 5, "steps": 4}  # 10 s on two cores


def _skew(routing: str) -> float | None:
    """The exponent of zipf:S, infinity for one-hot, None for the router's own."""
    kind, _, exponent = routing.partition(":")
    try:
        if kind == "zipf" and float(exponent) >= 0:
            return float(exponent)
    except ValueError:
        pass
    if routing not in ("router", "one-hot"):
        raise UsageError(f"routing = {routing}: give router, zipf:1.2 (or another exponent) or one-hot")
    return math.inf if routing == "one-hot" else None


class Layer(nn.Module):
    """Router and experts with one backend or peer, and routing that may be laid down."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, backend: str, indices_TK: torch.Tensor | None) -> None:
        super().__init__()
        self.activation, self.indices_TK = config.activation, indices_TK
        peer = PEERS.get(backend)
        self.compute = functools.partial(expert_mlp, backend=backend) if peer is None else peer_mlp(peer)
        self.router, self.experts = Router(config.width, moe), Experts(config, moe.experts)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) → (T, D)."""
        e = self.experts
        x_TD, weights_TK, indices_TK, logits_TE = self.router.decide(x_TD)
        if self.indices_TK is not None:  # the router's work is done all the same
            indices_TK = self.indices_TK
            weights_TK = torch.softmax(logits_TE.gather(1, indices_TK), dim=-1)
        y: torch.Tensor = self.compute(
            x_TD, weights_TK, indices_TK, e.w_in, e.w_out, e.b_in, e.b_out, activation=self.activation
        )
        return y


def bench_layer(
    settings: LayerBench,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Times the layer; returns what was measured and on what.

    Args:
        settings: what is timed.
        say: is called with a line for the user.
        keep: is called after each width with what there is by then, "stopped".

    Returns:
        {"environment", "devices" (their class, by `choice`), "date", "peers" (their versions), "settings" (in full),
        "tokens", "stopped" (by Ctrl-C, at a width that has no rows), "failed" (a line, where memory is too small for a
        width, which has no rows), "rows": [{"width", "backend", "error" (worst relative error against float64) or
        "reason" (why there is no time), "wall_ms", "busy_ms", "captured_ms", "forward_ms", "backward_ms", "tflops",
        "peak_mib", "kept_mib", "ratio" (busy over the twin's; wall on a CPU)}]}; what a device cannot measure is None.

    Raises:
        UsageError: a device, precision or backend that is not there.
    """
    device = resolve_device(settings.device)
    dtype = compute_dtype(settings.precision, device)
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    known = (*BACKENDS, *PEERS)
    for name in settings.backends:
        require(name in known, "backends", name, f"give some of {', '.join(known)}")
    obstacles = {name: _obstacle(name, device) for name in known if name in (settings.backends or known)}
    settings = filled(settings, FullLayerBench, SMALL_LAYERS, device, say)
    rows: list[dict[str, Any]] = []
    results = {
        "environment": environment(device, dtype),
        "devices": device_class(device),
        "peers": {name: peer.version() for name, peer in PEERS.items() if obstacles.get(name, "") is None},
        "date": datetime.now(UTC).date().isoformat(),
        "settings": asdict(settings),
        "tokens": settings.tokens,
        "stopped": True,
        "failed": None,
        "rows": rows,
    }
    with contextlib.suppress(KeyboardInterrupt):  # the widths that were timed are not lost
        for width in settings.widths:
            say(f"D = {width}")
            try:
                rows += _width(settings, width, device, dtype, obstacles)
            except (RuntimeError, TypeError) as problem:
                if not NO_MEMORY.search(str(problem)):
                    raise
                sizes = f"T = {settings.tokens:,}, D = {width:,}, F = {settings.multiple:g}·D, E = {settings.experts:,}"
                smaller = "fewer --tokens or --experts, or smaller --widths or --multiple"
                results["failed"] = f"memory: {device.type} has too little for {sizes}; give {smaller}"
                break
            keep(results)
        results["stopped"] = False
    return results


def _obstacle(name: str, device: torch.device) -> str | None:
    """Why a backend or peer cannot be timed, found by trying it; None if it can."""
    if name in PEERS:
        return PEERS[name].obstacle()
    found = availability(name, device)
    return None if found.usable else found.reason


def _width(
    settings: FullLayerBench, width: int, device: torch.device, dtype: torch.dtype, obstacles: dict[str, str | None]
) -> list[dict[str, Any]]:
    """The rows of one width; `obstacles` has what may be timed, and why it cannot."""
    tokens, hidden = settings.tokens, max(1, round(settings.multiple * width))
    moe = MoEConfig(settings.experts, settings.top_k, expert_hidden=hidden)
    config = ModelConfig(1, 1, width, 1, activation=settings.activation, bias=settings.bias, moe=moe)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(device, dtype)
    upstream = torch.randn(tokens, width, generator=generator).to(device, dtype)
    indices = _laid_down(settings, tokens, generator)
    indices = None if indices is None else indices.to(device)
    twin_config = ModelConfig(
        1, 1, width, 1, hidden=settings.top_k * hidden, activation=settings.activation, bias=settings.bias
    )
    layers: dict[str, nn.Module] = {TWIN: _drawn(FeedForward(twin_config), device)}
    rows: list[dict[str, Any]] = []
    right = _drawn(Layer(config, moe, "reference", indices), device).double()
    expected, chosen = _results(right, x.double(), upstream.double())
    for name, obstacle in obstacles.items():
        row: dict[str, Any] = {"width": width, "backend": name}
        rows.append(row)
        if obstacle is not None:
            row["reason"] = obstacle
            continue
        try:
            layer = _drawn(Layer(config, moe, name, indices), device)
            order = _rows_in_order(layer, name, hidden)
            found, own = _results(layer, x, upstream)
        except UsageError as refused:  # a dtype, biases or a size that this backend does not take
            row["reason"] = str(refused)
            continue
        except Exception as problem:  # of a kernel on a device that it does not know, or of another's package
            row["reason"] = f"failed ({first_line(problem)})"
            continue
        tipped = int((own.sort(1).values != chosen.sort(1).values).any(1).sum())
        if tipped > 1 + TIPPED * tokens:
            row["reason"] = f"sends {tipped:,} of {tokens:,} tokens to other experts than float64 does"
            continue
        right.indices_TK = own  # of the experts that they went to, where rounding tipped a token to another
        compared = _results(right, x.double(), upstream.double())[0] if tipped else expected
        gated = {n: compared[n][:, order] for n in GATED if n in compared and order is not None}
        errors = [_apart(found[n].double(), t) for n, t in (compared | gated).items()]
        row["error"] = torch.stack(errors).max().item()  # unlike Python's, NaN where one is
        if not row["error"] <= TOLERANCE[dtype]:
            row["reason"] = f"wrong by {row['error']:.2g} relative to float64, more than {TOLERANCE[dtype]:g}"
            continue
        layers[name] = layer
    del expected, right
    timed = _timed(settings, layers, x, upstream)
    flops = (18 if settings.activation == "swiglu" else 12) * tokens * settings.top_k * width * hidden
    rows.insert(0, {"width": width, "backend": TWIN})
    for row in rows:
        if (times := timed.get(row["backend"])) is not None:
            counted, base = (t["busy_ms"] or t["wall_ms"] or math.nan for t in (times, timed[TWIN]))
            row |= times | {"tflops": flops / counted / 1e9, "ratio": counted / base}
    return rows


def _apart(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The relative error; the absolute one of what is to be zero, as a router's gradient with K = 1 is."""
    apart, size = torch.linalg.vector_norm(found - right), torch.linalg.vector_norm(right)
    return torch.where(size > 0, apart / size, apart)


def _laid_down(settings: LayerBench, tokens: int, generator: torch.Generator) -> torch.Tensor | None:
    """(T, K) experts, all different for a token, in proportion to the skew; None where the router decides."""
    skew = _skew(settings.routing)
    if skew is None:
        return None
    if skew == math.inf:
        return torch.arange(settings.top_k).expand(tokens, -1).contiguous()
    share = (torch.arange(settings.experts) + 1.0) ** -skew
    return torch.multinomial(share.expand(tokens, -1), settings.top_k, generator=generator)


def _drawn(layer: Drawn, device: torch.device) -> Drawn:
    """The same values for every backend: parameters have the same names in all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(layer.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return layer.to(device)


GATED = ("experts.w_in", "experts.b_in")  # parameters with the gate's rows and the value's


def _rows_in_order(layer: Layer, name: str, hidden: int) -> torch.Tensor | None:
    """Puts the rows of a gated layer's parameters into a peer's order, and returns it; None where it is ours."""
    if name not in PEERS or layer.activation != "swiglu":
        return None
    order = PEERS[name].gated_rows(hidden)
    with torch.no_grad():
        for parameter in (p for n, p in layer.named_parameters() if n in GATED):
            parameter.copy_(parameter[:, order.to(parameter.device)].clone())
    return order


def _results(layer: Layer, x: torch.Tensor, upstream: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Output and gradients of one step, and the experts that tokens went to."""
    x = x.detach().requires_grad_()
    y = layer(x)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], upstream)
    chosen = layer.indices_TK if layer.indices_TK is not None else layer.router.decide(x)[2]
    return {"y": y.detach()} | dict(zip(["x", *parameters], gradients, strict=True)), chosen


def _timed(
    settings: FullLayerBench, layers: dict[str, nn.Module], x: torch.Tensor, upstream: torch.Tensor
) -> dict[str, dict[str, float | None]]:
    """The times of each layer, all in turns."""
    device = x.device
    steps = {name: _step(layer, x, upstream) for name, layer in layers.items()}
    graphs = {name: captured(step, device) for name, step in steps.items()}
    for step in steps.values():
        wall_ms(step, 3, device)
    walls: dict[str, list[float]] = {name: [] for name in steps}
    replays: dict[str, list[float]] = {name: [] for name in steps}
    forwards = {name: _forward(layer, x) for name, layer in layers.items()}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}  # of a step, and of its forward pass
    for number in range(settings.rounds):
        for name, step in steps.items():
            walls[name].append(wall_ms(step, settings.steps, device))
            if (graph := graphs[name]) is not None:
                replays[name].append(wall_ms(graph, settings.steps, device))
            if device.type == "cpu":  # all time is busy
                seen[name].append((walls[name][-1], wall_ms(forwards[name], settings.steps, device)))
            elif number < PROFILED:
                whole, front = (busy_ms(part, settings.steps, device) for part in (step, forwards[name]))
                seen[name] += [(whole, front)] if whole and front else []
    found: dict[str, dict[str, float | None]] = {}
    for name, layer in layers.items():
        whole, front = (
            (statistics.median(times) for times in zip(*seen[name], strict=True)) if seen[name] else (None, None)
        )
        peak, kept = peak_and_kept_mib(forwards[name], lambda y: y.backward(upstream), device)
        _forget(layer)
        found[name] = {
            "wall_ms": statistics.median(walls[name]), "busy_ms": whole if device.type != "cpu" else None,
            "captured_ms": statistics.median(replays[name]) if replays[name] else None,
            "forward_ms": front, "backward_ms": whole - front if whole and front else None,
            "peak_mib": peak, "kept_mib": kept,
        }  # fmt: skip
    return found


def _forward(layer: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    leaf = x.detach().requires_grad_()

    def forward() -> torch.Tensor:
        y: torch.Tensor = layer(leaf)
        return y

    return forward


def _step(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> Callable[[], object]:
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaf), wanted, upstream)


def _forget(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.grad = None
