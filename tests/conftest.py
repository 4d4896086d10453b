"""What every test needs: a home of its own for prepared data, repeatable hypothesis, a worker's share of the cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from moelab.config import DataConfig, ModelConfig, MoEConfig, RunConfig, TrainingConfig
from moelab.presets import arm_model

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)

# Or each worker's compiler would start as many processes as there are cores, and each process that a test starts as
# many threads, which wait for one another for longer than they work while those of another worker run in between. Set
# in workers alone: what the process that starts them sets they inherit.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    for variable in ("TORCHINDUCTOR_COMPILE_THREADS", "OMP_NUM_THREADS"):
        os.environ[variable] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def kept_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What compilers keep: shared by the workers of a session, and new in each: a stale graph would pass for ours."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / name))


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MOELAB_HOME."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MOELAB_HOME", str(folder))
    return folder


@pytest.fixture
def shared_data() -> Path:
    """WikiText and GPT-2's ranks, where they lie beside the checkout."""
    if not SHARED_DATA.exists():
        pytest.skip(f"no data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text with structure to learn: sums, written out, one document a line group."""
    lines = [f"{a} plus {b} is {a + b}.\n" for a in range(60) for b in range(60)]
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def tiny_run(story: Path) -> Callable[..., RunConfig]:
    """Makes a run of a two-layer model on `story` with the bytes tokenizer; keywords change TrainingConfig."""

    def make(arm: str = "dense", *, moe: MoEConfig | None = None, text: Path = story, **training: object) -> RunConfig:
        settings: dict[str, object] = {
            "steps": 12, "batch_size": 4, "accumulation": 1, "learning_rate": 3e-3, "warmup_steps": 2,
            "evaluation_interval": 6, "checkpoint_interval": 4, "log_interval": 2, "device": "cpu", "precision": "fp32",
        }  # fmt: skip
        model = ModelConfig(layers=2, heads=2, width=32, context=32)
        return RunConfig(
            preset="smoke",
            arm=arm,
            model=arm_model(arm, model, moe or MoEConfig(experts=4, top_k=2)),
            data=DataConfig(data=f"text:{text}", tokenizer="bytes"),
            training=TrainingConfig(**(settings | training)),  # type: ignore[arg-type]
        )

    return make
