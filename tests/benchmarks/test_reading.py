"""The page that reads the reference results, of runs whose losses follow a known law."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import Fits, Stored, write_page

from moelab.compare import Comparison
from moelab.config import MoEConfig
from moelab.presets import PRESETS, arm_model
from moelab.training.loop import write_aside

TOKENS = 40_960_000
FLOPS = {"5m": 1.2e8, "40m": 5e8, "124m": 1.1e9, "350m": 2.9e9}
WIDER = 1.5  # FLOPs of dense-wide and moe over those of dense


def law(compute: float) -> float:
    return 2.2 + 1.1 * (compute / 1e16) ** -0.3


def entry(arm: str, budget: str, **figures: Any) -> dict[str, Any]:
    return {"arm": arm, "against": "dense", "budget": budget} | figures


def stored(size: str, worth: float, context: int = 1024, **changes: Any) -> dict[str, Any]:
    """A size's results.json: dense runs on the law, and a moe with the loss of `worth` times its compute."""
    model = PRESETS[size].model
    arms: dict[str, Any] = {}
    for arm, cost in {"dense": 1.0, "moe": WIDER, "dense-wide": WIDER}.items():
        flops = int(FLOPS[size] * cost)
        loss = law(flops * TOKENS * (worth if arm == "moe" else 1))
        figures = {"val_loss": loss, "val_bits_per_byte": loss / 3, "tokens_per_second": 1e6, "mfu": None}
        run = {"seed": 0, "budget": "tokens", "folder": f"{arm}-seed0", "tokens": TOKENS, "seconds": 60.0} | figures
        shape = {"context": context, "moe": {"experts": 8} if arm_model(arm, model, MoEConfig()).moe else None}
        parameters = {"total": 1_000_000, "active": 1_000_000, "embedding": 1}
        arms[arm] = {"parameters": parameters, "flops_per_token": flops, "runs": [run], "model": shape}
    return {
        "arms": arms, "seeds": [0], "comparisons": [], "to_reach": [], "command": "python",
        "training": {"steps": 5000, "batch_size": 8, "accumulation": 1, "learning_rate": 3e-4},
        "data": {"name": "x", "train_tokens": 1, "valid_tokens": 1, "tokenizer": "gpt2", "fingerprint": "ab"},
        "environments": [{"environment": {"device": "a GPU", "driver": None}, "runs": []}],
    } | changes  # fmt: skip


def page(folder: Path, sizes: dict[str, dict[str, Any]]) -> str:
    for name, results in sizes.items():
        (folder / name).mkdir()
        write_aside(folder / name / "results.json", json.dumps(results))
    planned = {name: Comparison(preset=name) for name in PRESETS if name != "smoke"}
    return write_page(folder, planned).read_text()


def worth(text: str, run: str) -> str:
    """The last cell but one of a run's row in the table of what its loss is worth."""
    return worths(text, run)[0]


def worths(text: str, run: str) -> tuple[str, str]:
    """By all dense runs, and by those of the arm dense alone."""
    section = text.partition("## By how much compute")[2]
    found = re.search(rf"^\| {run} .* \| ([^|]*) \| ([^|]*) \|$", section, flags=re.MULTILINE)
    assert found is not None
    return found[1], found[2]


@given(multiplier=st.floats(0.7, 2.0))
def test_the_multiplier_that_losses_were_drawn_with_is_recovered(multiplier: float) -> None:
    fits = Fits([Stored(size, stored(size, multiplier), {}) for size in FLOPS])
    ((group, found),) = fits.laws.items()
    assert group == (1024, TOKENS)
    by_name = {point.name: point for point in fits.experts[group]}
    for size in ("40m", "124m"):  # whose worth lies between the least and the most dense compute
        run = by_name[f"{size} moe"]
        compute = found.compute(run.loss)
        assert compute is not None
        assert compute / run.compute == pytest.approx(multiplier, rel=1e-3)


def test_the_page_says_what_the_loss_is_worth_and_where_that_is_extrapolated(tmp_path: Path) -> None:
    text = page(tmp_path, {size: stored(size, 1.8) for size in FLOPS})
    assert worth(text, "124m moe").startswith("1.80 × (1.80 to 1.80 with the largest residual")
    assert worth(text, "350m moe").startswith("more than 1.00 ×; extrapolated: 1.80 × by the fit")
    assert "fitted to 8 runs from 4.92 PFLOP to 178 PFLOP" in text
    assert text.count("L(C) = 2.200 + ") == 2  # of all dense runs, and of the arm alone
    picture = (tmp_path / f"compute-1024-{TOKENS}.svg").read_text()
    assert all(picture.count(f">{words}<") == 1 for words in (*FLOPS, "dense", "moe", "dense-wide"))


def test_a_worse_dense_wide_flatters_the_experts_by_one_fit_and_not_by_the_other(tmp_path: Path) -> None:
    sizes = {size: stored(size, 1.2) for size in FLOPS}
    for results in sizes.values():
        results["arms"]["dense-wide"]["runs"][0]["val_loss"] += 0.1
    by_all, alone = worths(page(tmp_path, sizes), "124m moe")
    assert alone.startswith("1.20 × (1.20 to 1.20")
    assert float(by_all[:4]) > 1.25


def test_a_loss_under_the_floor_is_beyond_every_dense_compute(tmp_path: Path) -> None:
    sizes = {size: stored(size, 1.8) for size in FLOPS}
    sizes["350m"]["arms"]["moe"]["runs"][0]["val_loss"] = 2.1
    assert "extrapolated: none, by the fit's floor" in worth(page(tmp_path, sizes), "350m moe")


def test_runs_of_another_context_have_no_part_in_a_fit(tmp_path: Path) -> None:
    sizes = {size: stored(size, 1.3) for size in FLOPS}
    sizes["5m"] = stored("5m", 1.3, context=256)
    text = page(tmp_path, sizes)
    assert "fitted to 6 runs" in text
    assert "At context 256 and 41.0 M tokens: no fit." in text
    assert "5m moe" not in text.partition("## By how much compute")[2].partition("## Losses")[0]


def test_nothing_that_was_not_run_is_a_number(tmp_path: Path) -> None:
    text = page(tmp_path, {})
    assert "Nothing is stored here yet." in text
    assert text.count("| all of it |") == 4
    assert not re.search(r"\b0(\.0+)?\b", text)
    assert "## Losses" not in text


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"difference": -0.054, "ci95": [-0.09, -0.018]}, "**won**, −0.054 (−0.090 to −0.018)"),
        ({"difference": 0.021, "ci95": [0.01, 0.032]}, "**lost**, +0.021 (+0.010 to +0.032)"),
        ({"difference": 0.021, "ci95": None}, "**higher**, +0.021"),
        ({"difference": -0.02, "ci95": [-0.05, 0.01]}, "no difference shown, −0.020 (−0.050 to +0.010)"),
        ({"difference": -0.0002, "ci95": None}, "the same to 0.001"),
        ({"difference": -0.03, "ci95": None, "interpolated": True}, "**lower**, −0.030, *read off*"),
        ({"difference": None, "ci95": None}, "not measured"),
    ],
)
def test_who_won_is_said_of_each_budget(tmp_path: Path, figures: dict[str, Any], said: str) -> None:
    entries = [entry("moe", "tokens", **({"interpolated": False} | figures))]
    text = page(tmp_path, {"5m": stored("5m", 1.0, comparisons=entries)})
    assert f"| 5m | moe | dense | {said} | not measured | not measured |" in text


def test_what_size_alone_did_is_said_as_who_won_is(tmp_path: Path) -> None:
    told = {"5m": (-0.02, [-0.03, -0.01]), "40m": (0.01, [-0.03, 0.05]), "124m": (0.05, None)}
    sizes = {}
    for size, (difference, interval) in told.items():
        wide = entry("dense-wide", "tokens", difference=difference, ci95=interval, interpolated=False)
        sizes[size] = stored(size, 1.0, comparisons=[wide | {"arm": "moe"}, wide])
    text = page(tmp_path, sizes)
    assert (
        "at equal tokens: 5m **won**, −0.020 (−0.030 to −0.010); 40m no difference shown, +0.010 (−0.030 to +0.050); "
        "124m **higher**, +0.050. Where" in text
    )


def test_arms_that_different_code_trained_are_named(tmp_path: Path) -> None:
    def made(*commits: str | None) -> list[dict[str, Any]]:
        return [{"environment": {"device": "a GPU", "commit": c}, "runs": [f"run-{c}"]} for c in commits]

    entries = [entry("moe", "tokens", difference=0.1, ci95=None, interpolated=False)]
    sizes = {
        "5m": stored("5m", 1.0, comparisons=entries, environments=made("abc", None)),
        "40m": stored("40m", 1.0, comparisons=entries, environments=made("abc", "abc")),
    }
    text = page(tmp_path, sizes)
    assert "those of one code: 5m (abc: run-abc; not recorded: run-None)." in text


@pytest.mark.parametrize(("other", "section"), [("124m-lr1e-3", "At other learning rates"), ("124m-b32", "In larger")])
def test_where_sizes_are_compared_it_is_said_that_different_code_trained_them(
    tmp_path: Path, other: str, section: str
) -> None:
    def said(folder: Path, *commits: str | None) -> str:
        sizes = {name: stored("124m", 1.0) for name in ("124m", other)}
        sizes[other]["training"] |= {"learning_rate": 1e-3, "batch_size": 32 if "-b" in other else 8}
        sizes[other]["arms"].pop("dense-wide")
        for results, commit in zip(sizes.values(), commits, strict=True):
            runs = [f"{arm}-seed0" for arm in results["arms"]]
            results["environments"] = [{"environment": {"device": "a GPU", "commit": commit}, "runs": runs}]
        for name, results in sizes.items():
            (folder / name).mkdir(parents=True)
            write_aside(folder / name / "results.json", json.dumps(results))
        text = write_page(folder, {name: Comparison(preset="124m") for name in sizes}).read_text()
        return text.partition(f"## {section}")[2].partition("\n## ")[0]

    runs = "dense-seed0, moe-seed0"  # and not dense-wide, which one of them lacks
    assert f"By commit: abc: 124m {runs}; def: {other} {runs}." in said(tmp_path / "two", "abc", "def")
    assert f"By commit: not recorded: 124m {runs}; abc: {other} {runs}." in said(tmp_path / "unknown", None, "abc")
    assert "By commit" not in said(tmp_path / "one", "abc", "abc")


def test_the_backend_of_the_experts_is_said_where_it_is_recorded(tmp_path: Path) -> None:
    sizes = {size: stored(size, 1.0) for size in ("5m", "40m", "124m")}
    for size in ("5m", "124m"):
        sizes[size]["arms"]["moe"]["runs"][0]["backend"] = "hopper"
    text = page(tmp_path, sizes)
    assert "| experts computed by | 5m, 124m | `hopper`: moe |" in text


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.64, "**Met** by moe, in 0.64 of it."), (0.71, "**Missed** by moe, in 0.71 of it."), (None, "**Missed**: none")],
)
def test_the_goal_is_judged_at_its_size(tmp_path: Path, ratio: float | None, said: str) -> None:
    reached = {"ratio": ratio, "ci95": None, "runs": 1, "reached": int(ratio is not None), "spent": None}
    text = page(tmp_path, {"124m": stored("124m", 1.0, to_reach=[entry("moe", "seconds", **reached)])})
    assert said in text


def test_what_was_spent_for_the_same_loss_is_said_in_tokens_and_seconds(tmp_path: Path) -> None:
    known = {"ci95": None, "runs": 1, "reached": 1}
    entries = [
        entry("moe", "tokens", ratio=0.8, spent=[32_768_000, TOKENS], **known),
        entry("moe", "seconds", ratio=1.1, spent=[66.0, 60.0], **known),
    ]
    text = page(tmp_path, {"5m": stored("5m", 1.0, to_reach=entries)})
    assert "| 0.80 × | not measured | 1.10 × | 32.8 M against 41.0 M | 66.0 against 60.0 |" in text


def test_arms_are_compared_at_the_best_of_their_learning_rates(tmp_path: Path) -> None:
    """And runs at other rates have no part in a fit."""
    sizes = {size: stored(size, 1.3) for size in FLOPS}
    sizes["5m-lr1e-3"] = stored("5m", 4.0)
    sizes["5m-lr1e-3"]["training"]["learning_rate"] = 1e-3
    for run in sizes["5m-lr1e-3"]["arms"]["dense"]["runs"]:
        run["val_loss"] += 1
    for arm in sizes["5m"]["arms"].values():  # a seed that was run at one rate alone, and does not count
        arm["runs"].append(arm["runs"][0] | {"seed": 1, "val_loss": 9.0})
    for name, results in sizes.items():
        (tmp_path / name).mkdir()
        write_aside(tmp_path / name / "results.json", json.dumps(results))
    text = write_page(tmp_path, {name: Comparison(preset=name.partition("-")[0]) for name in sizes}).read_text()
    dense, moe = law(FLOPS["5m"] * TOKENS), law(FLOPS["5m"] * TOKENS * WIDER * 4.0)
    losses = f"0.0003: {dense:.4f}, 0.001: {dense + 1:.4f}"
    assert f"| 5m | dense | 1 | {losses} | 0.0003 (the lowest tried) | {dense:.4f} |" in text
    assert f"| 0.001 (the highest tried) | {moe:.4f} |" in text
    assert f"At 5m, each at its best, moe is {dense - moe:.3f} below dense (one seed)." in text
    assert "At 40m" not in text
    assert "fitted to 8 runs" in text


def test_larger_steps_stand_beside_those_of_all_sizes(tmp_path: Path) -> None:
    """And have no part in a fit, nor among the learning rates; the goal is judged at them too."""
    sizes = {size: stored(size, 1.3) for size in FLOPS}
    reached = {"ci95": None, "runs": 1, "reached": 1, "spent": None}
    for name, ratio in (("124m", 1.2), ("124m-b32", 0.6)):
        sizes[name] = stored("124m", 1.3, to_reach=[entry("moe", "seconds", ratio=ratio, **reached)])
    runs = {arm: facts["runs"] for arm, facts in sizes["124m-b32"]["arms"].items()}
    before = {arm: of_arm[0]["val_loss"] for arm, of_arm in runs.items()}
    for arm, change in {"dense": 0.1, "moe": 0.01, "dense-wide": -0.01}.items():
        runs[arm][0]["val_loss"] += change
    runs["dense"].append(runs["dense"][0] | {"seed": 1, "val_loss": 9.0})  # not run in the small steps: does not count
    sizes["124m-b32"]["training"] |= {"steps": 1250, "batch_size": 32, "learning_rate": 6e-4}
    for name, results in sizes.items():
        (tmp_path / name).mkdir()
        write_aside(tmp_path / name / "results.json", json.dumps(results))
    text = write_page(tmp_path, {name: Comparison(preset=name.partition("-")[0]) for name in sizes}).read_text()
    section = text.partition("## In larger steps")[2].partition("\n## ")[0]
    small, large = "5,000 × 8 at 0.0003", "1,250 × 32 at 0.0006"
    for arm, change in (("dense", 0.1), ("moe", 0.01)):
        losses = [f"{loss:.4f}" for loss in (before[arm], before[arm] + change)]
        assert f"| 124m-b32 | {arm} | 1 | {small} | {losses[0]} | {large} | {losses[1]} | +{change:.3f} |" in section

    def goes(against: str, change: float) -> str:
        gap = before["moe"] - before[against]
        ends = [f"{value:+.3f}".replace("-", "−") for value in (gap, gap + change)]
        return f"At 124m-b32 moe against {against} goes from {ends[0]} to {ends[1]}, because "

    assert f"{goes('dense', -0.09)}dense ends higher, and not because moe ends lower." in section
    assert f"{goes('dense-wide', 0.02)}moe ends higher and dense-wide ends lower." in section
    assert "**Missed** by moe, in 1.20 of it; **Met** by moe, in 0.60 of it (124m-b32)." in text
    assert "fitted to 8 runs" in text
    assert "## At other learning rates" not in text
