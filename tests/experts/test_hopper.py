"""The products for Hopper: compiled, and run on an emulated GPU, where there is none; and on one."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_gpu import EmulatedLaunch
from hypothesis import given
from hypothesis import strategies as st

import moelab
from moelab.experts import choice, hopper, mlp, nvrtc, reference, self_check
from moelab.experts.activation import inner_size

needs_nvrtc = pytest.mark.skipif(
    nvrtc.no_compiler() is not None, reason=f"nothing to compile with: {nvrtc.no_compiler()}"
)


@needs_nvrtc
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_products_compile(blocks: int) -> None:
    code = hopper._source(blocks).compile("sm_90")
    for name in (b"forward", b"backward", b"weight_gradient", b"sum_parts"):
        assert b".text." + name in code


@needs_nvrtc
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "silu"])
def test_the_products_with_an_activation_compile(blocks: int, activation: str) -> None:
    code = hopper._activated(blocks, activation).compile("sm_90")
    for name in (b"up", b"slope"):
        assert b".text." + name in code


def test_the_shared_memory_is_what_the_source_lays_out_and_a_multiprocessor_has() -> None:
    source = (nvrtc.FOLDER / "tiles.cuh").read_text()
    named = dict(re.findall(r"\b(ROWS|COLUMNS|MOST_EXPERTS) = (\d+)", source))
    assert tuple(map(int, named.values())) == (hopper.ROWS, hopper.COLUMNS, hopper.MOST_EXPERTS)
    assert hopper.SHARED <= 227 * 1024 - 1024


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLaunch:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU with")
    return EmulatedLaunch(tmp_path_factory.mktemp("emulated"), "sm_90")


Shape = tuple[int, int, int, int, int]  # T, D, F, E, K


def errors(shape: Shape, activation: str, bias: bool, indices: torch.Tensor, device: str = "cpu") -> list[float]:
    """Relative errors of the output and of every gradient against float64."""
    tokens, width, hidden, experts, top_k = shape
    inner = inner_size(activation, hidden)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (tokens, width), (tokens, top_k), (experts, inner, width), (experts, width, hidden), (experts, inner),
        (experts, width),
    ]  # fmt: skip
    drawn: list[torch.Tensor | None] = [
        (torch.randn(size, generator=generator) / (size[-1] ** 0.5 if len(size) == 3 else 1)).bfloat16()
        for size in sizes
    ]
    drawn = drawn if bias else [*drawn[:4], None, None]
    upstream = torch.randn(tokens, width, generator=generator).bfloat16()

    def results(module: ModuleType, dtype: torch.dtype, place: str) -> list[torch.Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [
            t if t is None else t.to(place, wide if i == 1 else dtype).requires_grad_() for i, t in enumerate(drawn)
        ]
        x, weights, *parameters = leaves
        y = module.expert_mlp(x, weights, indices.to(place), *parameters, activation)
        found = torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.to(place, y.dtype))
        return [t.detach().double().cpu() for t in (y, *found)]

    pairs = zip(results(hopper, torch.bfloat16, device), results(reference, torch.float64, "cpu"), strict=True)
    return [((one - other).norm() / other.norm()).item() for one, other in pairs]


def routed(shape: Shape, routing: str) -> torch.Tensor:
    tokens, _, _, experts, top_k = shape
    if routing == "one-hot":
        return torch.arange(top_k).expand(tokens, -1).contiguous()
    generator = torch.Generator().manual_seed(1)
    busy = max(top_k, experts - 1)  # the last expert is idle
    indices = torch.stack([torch.randperm(busy, generator=generator)[:top_k] for _ in range(tokens)])
    if routing == "dropped":
        indices[::3, 0] = -1
    return indices


CASES = [
    ((70, 128, 128, 2, 1), "gelu", False, "uneven"),
    ((300, 512, 256, 3, 2), "gelu", True, "uneven"),  # several turns of the stages
    ((200, 128, 384, 3, 2), "gelu", True, "uneven"),  # tiles of which half is there
    ((200, 128, 256, 4, 2), "silu", True, "dropped"),
    ((100, 128, 256, 3, 2), "swiglu", True, "uneven"),
    ((150, 256, 128, 3, 2), "relu2", True, "one-hot"),
    ((142, 128, 128, 2, 1), "gelu", True, "one-hot"),  # of 14 rows some warps have four, others three
    ((1, 128, 128, 5, 2), "gelu_tanh", True, "uneven"),
]


@pytest.mark.parametrize(("shape", "activation", "bias", "routing"), CASES, ids=str)
def test_emulated_outputs_and_gradients_are_those_of_float64(
    shape: Shape, activation: str, bias: bool, routing: str, emulated: EmulatedLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight gradient is cut into parts, which end where no block of rows does; clusters have two blocks or one."""
    monkeypatch.setattr(nvrtc, "launches", emulated.launches)
    monkeypatch.setattr(hopper, "SHORTEST", 64)
    monkeypatch.setattr(hopper, "LOWEST", 80)
    hopper._cuts.cache_clear()
    assert all(e <= 1e-2 for e in errors(shape, activation, bias, routed(shape, routing)))  # NaN is not


def test_rows_of_another_expert_or_of_nobody_stay_out_of_a_weight_gradient(emulated: EmulatedLaunch) -> None:
    generator = torch.Generator().manual_seed(2)
    d_y, x = (torch.randn(120, 128, generator=generator).bfloat16() for _ in range(2))
    d_y[50:], x[50:] = torch.nan, torch.nan
    offsets = torch.tensor([50, 100], dtype=torch.int32)
    products = hopper.Products(emulated, offsets, torch.device("cpu"))  # type: ignore[arg-type]
    found = products.weight_gradient(d_y, x)
    right = d_y[:50].double().T @ x[:50].double()
    assert ((found[0].double() - right).norm() / right.norm()).item() <= 1e-2
    assert found[1].isnan().all()


def test_gradients_of_fp32_matrices_are_not_rounded(emulated: EmulatedLaunch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "launches", emulated.launches)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 128, generator=generator).bfloat16()
    w_in = torch.randn(2, 256, 128, generator=generator).requires_grad_()
    w_out = torch.randn(2, 128, 256, generator=generator).requires_grad_()
    indices = torch.arange(40)[:, None] % 2
    call = partial(moelab.expert_mlp, x, torch.ones(40, 1), indices)
    monkeypatch.setattr(mlp, "_chosen", lambda backend, *_: backend)  # it is usable on GPUs only
    wide, narrow = (
        torch.autograd.grad(call(*given, backend="hopper").sum(), [w_in, w_out])
        for given in ((w_in, w_out), (w_in.bfloat16(), w_out.bfloat16()))
    )
    for one, other in zip(wide, narrow, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one.bfloat16().float(), other)
        assert not torch.equal(one, other)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_operator_fits_its_fake_kernel_and_traces_into_one_graph(
    activation: str, emulated: EmulatedLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fp32 matrices and of such as begin between two multiples of 16 bytes."""
    monkeypatch.setattr(nvrtc, "launches", emulated.launches)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        numbers = torch.randn(math.prod(shape) + 1, generator=generator) / 4
        return numbers.to(dtype)[1:].view(shape).requires_grad_()  # from 2 or 4 bytes past a multiple of 16 on

    inner = inner_size(activation, 128)  # type: ignore[arg-type]
    x, weights = drawn(24, 128), drawn(24, 2, dtype=torch.float32)
    indices = torch.arange(48).view(24, 2) % 3
    for dtype in (torch.float32, torch.bfloat16):
        matrices = drawn(3, inner, 128, dtype=dtype), drawn(3, 128, 128, dtype=dtype)
        inputs = (x, weights, *matrices, drawn(3, inner), drawn(3, 128))
        call = partial(hopper.expert_mlp, indices_TK=indices, activation=activation)  # type: ignore[arg-type]
        names = ("x_TD", "weights_TK", "w_in", "w_out", "b_in", "b_out")
        traced = torch.compile(call, fullgraph=True, backend="aot_eager")
        outcomes = []
        for run in (call, traced):
            y = run(**dict(zip(names, inputs, strict=True)))
            outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
        for one, other in zip(*outcomes, strict=True):
            assert torch.equal(one, other)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(hopper.hopper_experts, (*inputs[:2], indices, *inputs[2:], activation), test_utils=tests)


@given(
    sizes=st.lists(st.integers(0, 20_000), min_size=1, max_size=12), tiles=st.sampled_from([1, 4, 16, 36, 72]),
    clusters=st.sampled_from([2, 66, 132]),
)  # fmt: skip
def test_there_is_room_for_every_part_of_a_weight_gradient_that_is_cut(
    sizes: list[int], tiles: int, clusters: int
) -> None:
    """However uneven the experts: parts as `Cuts` in hopper.cu counts them."""
    if sum(sizes) == 0:
        return
    target, last, room = hopper._cuts(sum(sizes), len(sizes), tiles, clusters)
    assert target % hopper.DEPTH == last % hopper.DEPTH == 0
    taken = 0
    for e, rows in enumerate(sizes):
        whole = rows < target + target // 2
        least = last if e == len(sizes) - 1 and whole else target
        parts = max(1, (rows + least // 2) // least) if whole and least == last else (rows + target // 2) // target
        parts = 1 if whole and least == target else parts
        assert parts <= max(1, -(-rows // hopper.DEPTH))  # none is empty
        taken += parts if parts > 1 else 0
    assert taken <= room


def test_the_trials_have_clusters_of_two_blocks_and_weight_gradients_that_are_cut() -> None:
    _, *large = hopper.TRIALS
    for trial in large:
        slots, busy = self_check.TOP_K * trial.tokens, trial.experts - 1
        assert slots >= hopper.LOWEST * trial.experts
        target, _, most = hopper._cuts(slots, trial.experts, 1, 66)
        assert slots // busy >= 1.5 * target
        assert most >= 2 * busy


@pytest.mark.long
def test_emulated_the_trials_are_passed(emulated: EmulatedLaunch, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sources that are compiled ahead of them."""
    launched = set()

    def launch(self: EmulatedLaunch, source: nvrtc.Source, *rest: Any, **more: Any) -> None:
        launched.add(source)
        original(self, source, *rest, **more)

    original = EmulatedLaunch.__call__
    monkeypatch.setattr(EmulatedLaunch, "__call__", launch)
    monkeypatch.setattr(nvrtc, "launches", emulated.launches)
    assert self_check._wrong(hopper, torch.device("cpu")) is None
    assert launched == set(hopper._of_trials())


def test_what_it_does_not_take_is_refused_in_one_line() -> None:
    assert "takes bf16" in (hopper.refuses(torch.float32, "gelu", True, False) or "")
    assert hopper.refuses_shape(choice.Shape(384, 128, 128, 2)) is None
    for shape, said in (
        (choice.Shape(100, 128, 2, 1), "width = 100: the backend hopper takes multiples of 128"),
        (choice.Shape(128, 200, 2, 1), "expert-hidden = 200: the backend hopper takes multiples of 128"),
        (choice.Shape(128, 128, 129, 1), "experts = 129: the backend hopper takes 128"),
    ):
        assert said in (self_check.refusal(hopper, torch.bfloat16, "gelu", bias=True, shape=shape) or "")


TRIALS = {
    "ends": ("pass", None),
    "waits for ever": ("import time; time.sleep(60)", "did not end in 3 seconds"),
    "crashes": ("import os; os.abort()", "failed"),
}


@pytest.mark.parametrize("trial", TRIALS)
def test_a_backend_whose_kernels_wait_is_tried_in_a_process_of_its_own(
    trial: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it is not known to end; what is known is kept."""
    does, said = TRIALS[trial]
    (tmp_path / "waiting.py").write_text(
        "from moelab.experts.reference import expert_mlp as right\n"
        "def identity(device): return ()\n"
        f"import os; open({str(tmp_path / 'processes')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        f"def expert_mlp(*given):\n    if __name__ in open({str(tmp_path / 'asked')!r}).read(): {does}\n"
        "    return right(*given)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(self_check, "PATIENCE", 3 if trial == "waits for ever" else 100)
    (tmp_path / "asked").write_text("waiting")
    import waiting  # type: ignore[import-not-found]

    cpu = torch.device("cpu")
    if trial == "ends":
        for _ in range(2):
            assert self_check.failure(waiting, cpu) is None
        assert len(list((home / "kernels").iterdir())) == 1
    else:
        found = self_check.failure(waiting, cpu)
        assert found is not None
        assert said is not None
        assert said in found
        (tmp_path / "asked").write_text("")  # what failed is tried again, what did not end or was wrong is not
        again = self_check.failure(waiting, cpu)
        assert again == (None if "fail" in said else found)
        kept = [str(file) for file in (home / "kernels").iterdir()]
        assert again is None or (len(kept) == 1 and f"(delete {kept[0]} to have it tried again)" in again)
    here, *others = (tmp_path / "processes").read_text().split()
    assert int(here) == os.getpid()
    assert len(others) == (2 if trial == "crashes" else 1)
    assert not any(Path(f"/proc/{other}").exists() for other in others)  # not even as a zombie
    sys.modules.pop("waiting")


def test_a_trial_ends_with_what_waits_for_it(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, while other things are done and its kernel waits for ever."""
    (tmp_path / "hanging.py").write_text(
        "def identity(device): return ()\n"
        "def expert_mlp(*given):\n    import time; time.sleep(60)\n"
        "def compile_ahead(device):\n    yield\n    raise KeyboardInterrupt\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)
    started = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, start=subprocess.Popen, **k: started.append(start(*a, **k)) or started[-1]
    )
    import hanging  # type: ignore[import-not-found]

    with pytest.raises(KeyboardInterrupt):
        self_check.failure(hanging, torch.device("cpu"))
    assert [trial.returncode for trial in started] == [-signal.SIGKILL]
    assert not (home / "kernels").exists()
    sys.modules.pop("hanging")


def test_what_the_trials_use_is_compiled_ahead(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := nvrtc.no_compiler()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    turns = hopper.compile_ahead(torch.device("cuda", 0))
    next(turns)
    (first,) = (home / "kernels").iterdir()
    assert first.name.startswith("rows-sm_90-")
    assert len(list(turns)) + 1 == len(hopper._of_trials())
    names = sorted(file.name.partition("-")[0] for file in (home / "kernels").iterdir())
    assert names == ["activated", "activated", "hopper", "hopper", "route", "rows", "rows"]


def tried() -> None:
    """Once in a process of pytest: the trial is one of its own, which compiles everything."""
    device = torch.device("cuda")
    if (reason := hopper.unusable(device)) is not None:
        pytest.skip(reason)
    found = mlp.availability("hopper", device)
    assert found.usable, found.reason


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "activation", "bias", "routing"), CASES, ids=str)
def test_outputs_and_gradients_on_a_gpu_are_those_of_float64(
    shape: Shape, activation: str, bias: bool, routing: str
) -> None:
    tried()
    larger = (shape[0] * 40, *shape[1:])
    assert all(e <= 1e-2 for e in errors(larger, activation, bias, routed(larger, routing), "cuda"))


@pytest.mark.gpu
def test_the_same_call_on_a_gpu_gives_the_same_bits() -> None:
    tried()
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(5000, 512, device="cuda", generator=generator).bfloat16().requires_grad_()
    w_in, w_out = (
        torch.randn(8, *s, device="cuda", generator=generator).bfloat16().requires_grad_()
        for s in ((1024, 512), (512, 1024))
    )
    weights = torch.rand(5000, 2, device="cuda", generator=generator).requires_grad_()
    indices = torch.rand(5000, 8, device="cuda", generator=generator).topk(2).indices
    leaves = [x, weights, w_in, w_out]

    def once() -> list[torch.Tensor]:
        y = hopper.expert_mlp(x, weights, indices, w_in, w_out, None, None, "gelu")
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    for one, other in zip(once(), once(), strict=True):
        assert torch.equal(one, other)
