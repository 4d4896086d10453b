"""The CUDA kernels: compiled for three generations and run on an emulated GPU, where there is none; and on one."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from emulated_gpu import EmulatedLaunch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moelab.experts import cuda, nvrtc, reference
from moelab.experts.choice import Shape

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROWS = (
    "dispatch",
    "dispatch_dots",
    "combine",
    "combine_backward",
    "activate",
    "activate_backward",
    "weighted_backward",
    "bias_parts",
    "sum_parts",
)

needs_nvrtc = pytest.mark.skipif(
    nvrtc.no_compiler() is not None, reason=f"nothing to compile with: {nvrtc.no_compiler()}"
)


# Without a GPU: the compiler


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "macros",
    [
        ("BFLOAT16", "gelu"),
        ("FLOAT16", "swiglu"),
        ("FLOAT32", "relu2"),
        ("BFLOAT16", "gelu_tanh"),
        ("FLOAT32", "silu"),
        ("FLOAT32", "gelu"),
        ("FLOAT16", "gelu"),
    ],
    ids=" ".join,
)
def test_the_row_kernels_compile(arch: str, macros: tuple[str, str]) -> None:
    dtype, activation = macros
    source = nvrtc.Source("rows.cu", (dtype, 1), ("ACTIVATION", cuda.ACTIVATIONS.index(activation)))
    code = source.compile(arch)
    assert code[:4] == b"\x7fELF"
    assert all(name.encode() in code for name in ROWS)


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_counting_and_ranking_compiles(arch: str) -> None:
    assert b"route" in nvrtc.Source("route.cu").compile(arch)


@needs_nvrtc
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_rows_move_16_bytes_at_a_time_and_arrays_stay_in_registers(dtype: torch.dtype) -> None:
    ptx = assembly(cuda._rows(dtype, "swiglu"), "sm_90")
    assert ".local" not in ptx
    for name in ROWS:
        body = re.split(r"\.entry ", ptx.split(f".entry {name}(")[1])[0]
        assert re.search(r"ld\.global(\.nc)?\.v4", body), name
        assert name == "bias_parts" or re.search(r"st\.global\.v4", body), name  # that writes few rows


def assembly(source: nvrtc.Source, arch: str) -> str:
    """PTX, which cuda-core makes only where there is a driver."""
    from cuda.bindings import nvrtc as compiler

    _, program = compiler.nvrtcCreateProgram(source.text().encode(), b"source", 0, None, None)
    options = [f"-arch={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in source.definitions(arch))]
    compiler.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = compiler.nvrtcGetPTXSize(program)
    ptx = b" " * size
    compiler.nvrtcGetPTX(program, ptx)
    return ptx.decode()


@needs_nvrtc
def test_compiled_code_is_kept_and_what_was_damaged_is_compiled_again(home: Path) -> None:
    code = nvrtc.Source("route.cu").cubin("sm_80")
    (kept,) = (home / "kernels").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert nvrtc.Source("route.cu").cubin("sm_80") == code
    nvrtc._write(kept, b"what another process compiled")
    assert nvrtc.Source("route.cu").cubin("sm_80") == b"what another process compiled"
    assert list((home / "kernels").iterdir()) == [kept]
    nvrtc.Source("route.cu").cubin("sm_90")
    nvrtc.Source("route.cu", ("OTHER", 1)).cubin("sm_80")
    nvrtc.Source("route.cu", feature="a").cubin("sm_90")
    assert len(list((home / "kernels").iterdir())) == 4


@needs_nvrtc
def test_a_home_that_cannot_be_written_costs_a_compilation_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "file"))
    assert nvrtc.Source("route.cu").cubin("sm_80")[:4] == b"\x7fELF"


def test_what_is_missing_is_named_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(nvrtc, "version", absent)
    assert nvrtc.no_compiler() == "cuda-core is not installed; pip install --upgrade 'moelab[cuda]'"
    assert "GPU" in str(cuda.unusable(torch.device("cpu")))


@needs_nvrtc
def test_a_cuda_core_without_the_maps_of_hopper_is_too_old_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cuda.core.TensorMapDescriptor")  # as cuda-core 0.6 is
    said = str(nvrtc.no_compiler())
    assert "cannot be used (cannot import name 'TensorMapDescriptor'" in said
    assert said.endswith("; pip install --upgrade 'moelab[cuda]'")


# Without a GPU: the emulated one


def emulated_gpu(factory: pytest.TempPathFactory, arch: str) -> EmulatedLaunch:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU with")
    return EmulatedLaunch(factory.mktemp("emulated"), arch)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EmulatedLaunch:
    """Of a generation without clusters, and of one with: only `route` knows the difference."""
    return emulated_gpu(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def without_clusters(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLaunch:
    return emulated_gpu(tmp_path_factory, "sm_80")


@pytest.fixture
def on_cpu(without_clusters: EmulatedLaunch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "launches", without_clusters.launches)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 2, 4), (1, 1, 1), (33, 2, 3), (256, 1, 31), (2048, 4, 8), (700, 3, 64), (260, 2, 1024), (50, 1, 3000)],
)  # fmt: skip
def test_slots_are_sorted_stably_and_numbers_out_of_range_are_dropped_slots(
    emulated: EmulatedLaunch, tokens: int, top_k: int, experts: int
) -> None:
    generator = torch.Generator().manual_seed(experts)
    indices = torch.randint(-2, experts + 2, (tokens, top_k), generator=generator)
    indices[::7] = 2**40
    found = cuda.route(emulated, indices, experts)  # type: ignore[arg-type]
    bins = torch.where((indices < 0) | (indices >= experts), experts, indices).flatten()
    slot_of_row = torch.argsort(bins, stable=True)
    assert torch.equal(found.slot_of_row.long(), slot_of_row)
    assert torch.equal(found.row_of_slot[slot_of_row].long(), torch.arange(len(bins)))
    assert torch.equal(found.offsets.long(), bins.bincount(minlength=experts + 1)[:experts].cumsum(0))


@pytest.mark.parametrize("sizes", [(5, 2, 3), (9000, 2, 5)], ids=str)
def test_a_warp_that_takes_several_turns_ranks_like_one(emulated: EmulatedLaunch, sizes: tuple[int, int, int]) -> None:
    """9,000 × 2 slots are more than a block's 32 warps hold at once."""
    tokens, top_k, experts = sizes
    indices = torch.arange(tokens * top_k).view(tokens, top_k) * 7 % experts
    found = cuda.route(emulated, indices, experts)  # type: ignore[arg-type]
    assert torch.equal(found.slot_of_row.long(), torch.argsort(indices.flatten(), stable=True))


@pytest.mark.parametrize("width", [64, 100, 128, 1032, 2300])  # rows of one turn and several, aligned and not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_a_bias_of_each_slots_expert(
    without_clusters: EmulatedLaunch, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(width)
    x, bias = (torch.randn(n, width, generator=generator).to(dtype) for n in (21, 3))
    indices = torch.randint(-1, 3, (21, 2), generator=generator)
    launch: Any = without_clusters
    rows = cuda.Rows(launch, cuda._rows(dtype, "gelu"), cuda.route(launch, indices, 3), indices)
    found, dots = rows.dispatch_dots(x, bias)
    kept = indices >= 0
    assert torch.equal(found[: kept.sum()], rows.dispatch(x)[: kept.sum()])
    exact = (x.double()[:, None] * bias.double()[indices.clamp(min=0)]).sum(2)
    torch.testing.assert_close(dots.double()[kept], exact[kept], rtol=1e-5, atol=1e-4)
    partial = torch.randn(len(found), 5, generator=generator)
    partial[kept.sum() :] = torch.nan  # rows that nothing is written to
    sums = partial.sum(1)[rows.routing.row_of_slot.long()].view(indices.shape)
    for extra, added in ((dots, dots), (None, torch.zeros_like(dots))):
        right = torch.where(kept, sums + added, 0.0)
        torch.testing.assert_close(rows.slot_gradient(partial, torch.empty(21, 2), extra), right)


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=40), tall=st.integers(1, 80), dropped=st.integers(0, 9))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_end_where_as_many_rows_or_an_experts_last_are(
    without_clusters: EmulatedLaunch, counts: list[int], tall: int, dropped: int
) -> None:
    kernels, *_ = kernels_of(without_clusters, torch.float32, counts, dropped)
    expected, start = [], 0
    for own in counts:
        expected += [*range(start + tall, start + own, tall), start + own] if own else []
        start += own
    room = (start + dropped) // tall + len(counts)
    assert len(expected) <= room
    assert kernels.part_ends(tall, room).tolist() == expected + [start] * (room - len(expected))


def kernels_of(launch: Any, dtype: torch.dtype, counts: list[int], dropped: int) -> tuple[cuda.Rows, torch.Tensor, int]:
    """For experts that have so many slots; where their rows end, and how many rows there are."""
    bins = torch.tensor([e for e, own in enumerate(counts) for _ in range(own)] + [-1] * dropped, dtype=torch.int64)
    indices = bins[torch.randperm(len(bins), generator=torch.Generator().manual_seed(0)), None]
    routing = cuda.route(launch, indices, len(counts))
    return cuda.Rows(launch, cuda._rows(dtype, "relu2"), routing, indices), routing.offsets, len(bins)


@pytest.mark.parametrize("width", [16, 24, 20])  # the last in accesses of one element
@pytest.mark.parametrize(
    ("counts", "dropped"), [([90, 0, 7, 3], 5), ([0, 130], 0), ([32, 33, 31, 64, 0], 40), ([40] * 9, 1)], ids=str
)
def test_weight_gradients_of_parts_are_those_of_whole_experts(
    without_clusters: EmulatedLaunch, counts: list[int], dropped: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU where the products are one kernel, but with those of the CPU, and rows that are nobody's NaN."""
    monkeypatch.setattr(cuda, "LOWEST", 32)
    monkeypatch.setattr(cuda.products, "one_kernel", lambda *_: True)
    kernels, offsets, count = kernels_of(without_clusters, torch.bfloat16, counts, dropped)
    generator = torch.Generator().manual_seed(width)
    d_out, h, d_z, rows = (
        torch.randn(count, side, generator=generator).to(torch.bfloat16) for side in (width, 40, 40, width)
    )
    for t in (d_out, h, d_z, rows):
        t[offsets[-1] :] = torch.nan
    w_out, w_in = (torch.empty(len(counts), *sides, dtype=torch.bfloat16) for sides in ((width, 40), (40, width)))
    made: list[int] = []
    product = cuda.products.weight_gradient
    monkeypatch.setattr(
        cuda.products, "weight_gradient", lambda *called: made.append(len(called[3])) or product(*called)
    )
    found = kernels.weight_gradients(d_out, h, w_out, d_z, rows, w_in)
    assert made == [count // 32 + len(counts)] * 2
    starts = [0, *offsets.tolist()]
    for gradient, left, right in zip(found, (d_out, d_z), (h, rows), strict=True):
        for e, (start, end) in enumerate(itertools.pairwise(starts)):
            exact = left[start:end].double().T @ right[start:end].double()
            assert (gradient[e].double() - exact).norm() <= 6e-3 * exact.norm()


def test_only_matrices_of_few_tiles_are_made_of_parts() -> None:
    def rows_of_a_part(width: int, rows: int = 65_536) -> int:
        return cuda.part_rows(rows, torch.empty(width, 4 * width, device="meta"))

    assert [rows_of_a_part(width) for width in (256, 512, 768, 1024)] == [4608, 18_432, 18_432, 65_536]
    assert rows_of_a_part(64, 8192) == 1024
    assert rows_of_a_part(64, 700) >= 700  # whole


Leaves = list[torch.Tensor | None]


def drawn(shape: tuple[int, ...], activation: str, bias: bool, dtype: torch.dtype) -> tuple[Leaves, torch.Tensor]:
    """x, weights, w_in, w_out, b_in, b_out and the upstream gradient; and indices, the last expert idle."""
    tokens, width, hidden, experts, top_k = shape
    inner = 2 * hidden if activation == "swiglu" else hidden
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (tokens, width), (tokens, top_k), (experts, inner, width), (experts, width, hidden), (experts, inner),
        (experts, width), (tokens, width),
    ]  # fmt: skip
    made = [torch.randn(size, generator=generator) / 2 for size in sizes]
    leaves: Leaves = [t if i == 1 else t.to(dtype) for i, t in enumerate(made)]
    if not bias:
        leaves[4] = leaves[5] = None
    indices = torch.randint(0, max(1, experts - 1), (tokens, top_k), generator=generator)
    indices[torch.rand(tokens, top_k, generator=generator) < 0.2] = -1
    return leaves, indices


def results(call, leaves: Leaves, indices: torch.Tensor, activation: str, dtype: torch.dtype) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    wide = torch.promote_types(dtype, torch.float32)
    own = [None if t is None else t.to(wide if i == 1 else dtype).requires_grad_() for i, t in enumerate(leaves[:6])]
    x, weights, *parameters = own
    y = call(x, weights, indices, *parameters, activation)
    upstream = leaves[6]
    assert upstream is not None
    return [y.detach(), *torch.autograd.grad(y, [t for t in own if t is not None], upstream.to(y.dtype))]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "activation", "bias"),  # T, D, F, E, K
    [
        ((40, 64, 96, 5, 2), "gelu", True),
        ((37, 20, 36, 5, 3), "gelu", False),  # rows that are no multiple of 16 bytes
        ((9, 600, 1100, 3, 4), "swiglu", True),
        ((33, 100, 70, 64, 1), "swiglu", False),
        ((12, 32, 1096, 3, 2), "gelu_tanh", True),
        ((12, 16, 24, 3, 2), "relu2", True),
        ((500, 12, 40, 4, 2), "relu2", True),  # biases' gradients are summed in parts
        ((12, 16, 24, 1, 2), "silu", True),
        ((0, 16, 24, 3, 2), "silu", True),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], activation: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, indices = drawn(shape, activation, bias, dtype)
    expected = results(reference.expert_mlp, leaves, indices, activation, torch.float64)
    # Memory that is not written is NaN, so that reading it shows.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found = results(cuda.expert_mlp, leaves, indices, activation, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert ((one.double() - other).norm() / (other.norm() or 1)).item() <= TOLERANCE[dtype]


@pytest.mark.usefixtures("on_cpu")
def test_rows_that_are_not_aligned_are_moved_by_elements() -> None:
    leaves, indices = drawn((20, 16, 24, 3, 2), "gelu", True, torch.bfloat16)
    straight = results(cuda.expert_mlp, leaves, indices, "gelu", torch.bfloat16)
    askew: Leaves = [t if t is None else shifted(t) for t in leaves]
    assert all(t is None or t.data_ptr() % 16 for t in askew)
    found = results(cuda.expert_mlp, askew, indices, "gelu", torch.bfloat16)
    torch.testing.assert_close(found, straight, rtol=1e-5, atol=1e-6)  # other lanes sum the weights' gradients


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, one element off the alignment."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


@pytest.mark.usefixtures("on_cpu")
def test_a_nan_in_one_token_stays_in_that_token_and_an_idle_expert_has_gradient_0() -> None:
    leaves, indices = drawn((20, 16, 24, 4, 2), "gelu", True, torch.bfloat16)
    assert leaves[0] is not None
    leaves[0][7, 3] = torch.nan
    indices[7] = 1
    y, d_x, d_weights, *d_parameters = results(cuda.expert_mlp, leaves, indices, "gelu", torch.bfloat16)
    for values in (y, d_x, d_weights):
        assert values.isnan().any(1).nonzero().flatten().tolist() == [7]
    assert not any(gradient[3].any() for gradient in d_parameters)


@pytest.mark.usefixtures("on_cpu")
def test_a_backward_pass_makes_no_gradient_of_what_is_only_kept_for_it() -> None:
    """Zeros of z's size cost a GPU as much as a pass over it."""

    class Made(TorchDispatchMode):
        sizes: ClassVar[list[int]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "zeros" in str(func):
                self.sizes.append(out.numel())
            return out

    leaves, indices = drawn((20, 16, 24, 4, 2), "gelu", False, torch.float32)
    with Made():
        torch.zeros(3)
        results(cuda.expert_mlp, leaves, indices, "gelu", torch.float32)
    assert Made.sizes == [3]


@pytest.mark.usefixtures("on_cpu")
def test_the_operators_fit_their_fake_kernels_and_trace_into_one_graph() -> None:
    leaves, indices = drawn((10, 16, 24, 3, 2), "swiglu", True, torch.float32)
    indices.clamp_(min=0)  # rows of dropped slots are not written, and opcheck compares whatever stands there
    x, weights, *parameters = [t.requires_grad_() for t in leaves[:6] if t is not None]
    torch.library.opcheck(cuda.dispatched_experts, (x, weights, indices, *parameters, "swiglu"))
    traced = torch.compile(functools.partial(cuda.expert_mlp), fullgraph=True, backend="aot_eager")
    eager = results(cuda.expert_mlp, leaves, indices, "swiglu", torch.float32)
    compiled = results(traced, leaves, indices, "swiglu", torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(compiled, eager, strict=True))


def test_what_the_kernels_do_not_take_is_refused_in_one_line() -> None:
    refused = cuda.refuses(torch.float64, "gelu", bias=True, deterministic=False)
    assert refused == "precision = float64: the backend cuda takes bf16, fp16 and fp32; give another --backend"
    assert cuda.refuses_shape(Shape(4, 4, 3000, 1)) is None
    many = cuda.refuses_shape(Shape(4, 4, 3001, 1))
    assert many == "experts = 3001: the backend cuda takes 3000; give another --backend"


# On a GPU, beside test_expert_mlp.py


def usable() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := cuda.unusable(device)) is not None:
        pytest.skip(f"cuda: {reason}")
    return device


def on_gpu(leaves: Leaves, device: torch.device) -> Leaves:
    return [t if t is None else t.to(device) for t in leaves]


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [1, 2, 8, 63, 64, 255, 1024, 3000])
@pytest.mark.parametrize("tokens", [0, 1, 300, 32_768, 70_001])
def test_a_gpu_sorts_slots_stably(experts: int, tokens: int) -> None:
    device = usable()
    indices = torch.randint(-2, experts + 2, (tokens, 2), device=device)
    with nvrtc.launches(device) as launch:
        found, again = (cuda.route(launch, indices, experts) for _ in range(2))
    bins = torch.where((indices < 0) | (indices >= experts), experts, indices).flatten()
    assert torch.equal(found.slot_of_row.long(), torch.argsort(bins, stable=True))
    assert torch.equal(found.offsets.long(), bins.bincount(minlength=experts + 1)[:experts].cumsum(0))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", cuda.ACTIVATIONS)
def test_a_step_is_captured_in_a_graph_and_replayed_on_other_inputs(activation: str) -> None:
    device = usable()
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        pytest.skip("the products are one kernel on Hopper and data-centre Blackwell")
    leaves, indices = drawn((512, 64, 128, 8, 2), activation, True, torch.bfloat16)
    leaves, indices = on_gpu(leaves, device), indices.to(device)
    others, other_indices = on_gpu([t if t is None else 2 * t for t in leaves], device), indices.flip(0).contiguous()
    expected = results(cuda.expert_mlp, others, other_indices, activation, torch.bfloat16)
    still = [t if t is None else t.detach().requires_grad_() for t in leaves[:6]]
    upstream = leaves[6]

    def step() -> list[torch.Tensor]:
        y = cuda.expert_mlp(still[0], still[1], indices, *still[2:], activation)  # type: ignore[arg-type]
        return [y.detach(), *torch.autograd.grad(y, [t for t in still if t is not None], upstream)]

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        indices.copy_(other_indices)
        for here, other in zip((*still, upstream), others, strict=True):
            if here is not None and other is not None:
                here.copy_(other)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.xdist_group("all of the GPU's memory")
def test_rows_may_have_more_than_2_to_the_31_elements() -> None:
    device = usable()
    tokens, width, experts = 2**20 + 3, 2056, 3
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device=device).normal_()
    indices = torch.randint(0, experts, (tokens, 1), device=device)
    weights = torch.full((tokens, 1), 0.5, device=device)
    with nvrtc.launches(device) as launch:
        kernels = cuda.Rows(launch, cuda._rows(x.dtype, "relu2"), cuda.route(launch, indices, experts), indices)
        rows = kernels.dispatch(x)
        assert torch.equal(rows[-5:], x[kernels.routing.slot_of_row[-5:].long()])
        assert torch.equal(kernels.combine(rows), x)
        d_rows, _ = kernels.combine_backward(x, rows, weights, None)
        assert torch.equal(kernels.combine(d_rows, 2 * weights), x / 2)
        h = kernels.activate(rows, None, width)
        assert torch.equal(h[-5:], rows[-5:].float().relu().square().bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("skew", [0.0, 1.0])  # a share of the slots that all go to one expert
@pytest.mark.parametrize(("width", "hidden"), [(256, 1024), (200, 328)])
def test_a_gpu_makes_weight_gradients_of_parts(width: int, hidden: int, skew: float) -> None:
    device = usable()
    leaves, indices = drawn((4096, width, hidden, 8, 2), "gelu", True, torch.bfloat16)
    indices[torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < skew] = 2
    leaves, indices = on_gpu(leaves, device), indices.to(device)
    expected = results(reference.expert_mlp, leaves, indices, "gelu", torch.float64)
    found, again = (results(cuda.expert_mlp, leaves, indices, "gelu", torch.bfloat16) for _ in range(2))
    for one, other, twice in zip(found, expected, again, strict=True):
        assert ((one.double() - other).norm() / (other.norm() or 1)).item() <= 1e-2
        assert torch.equal(one, twice)
