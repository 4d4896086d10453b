"""What a report shows and says of routers: its numbers, what it calls unhealthy, and when it says nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.compare import Comparison, run_comparison
from moelab.compare.figures import pictures
from moelab.compare.results import read_results
from moelab.compare.routing import moved_by_type, pairs_over_chance, routing_notes, types_over_chance
from moelab.config import ModelConfig, MoEConfig

Finish = Callable[..., Path]
Make = Callable[..., Comparison]
KINDS = ["expert-load", "routing", "expert-norms", "expert-pairs", "token-types"]


@pytest.fixture(scope="module")
def reported(small: Make, finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four arms, two of them with experts, over two seeds."""
    folder = tmp_path_factory.mktemp("routing")
    comparison = small(arms=("dense", "moe", "dense-wide", "moe-matched"), seeds=2)
    run_comparison(comparison, finish(comparison, folder))
    return folder


def captions(folder: Path) -> dict[str, str]:
    return {picture.name: picture.caption for picture in pictures(*read_results(folder))}


def final(folder: Path, run: str = "moe-seed0") -> dict[str, Any]:
    """The last measurement of a run."""
    return json.loads((folder / run / "metrics.jsonl").read_text().splitlines()[-1])["routing"]


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes every line of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def with_routing(**figures: Any) -> Callable[[dict[str, Any]], None]:
    def change(line: dict[str, Any]) -> None:
        if "routing" in line:
            line["routing"] |= figures

    return change


def test_every_arm_with_experts_has_its_pictures_and_no_other(reported: Path) -> None:
    drawn = pictures(*read_results(reported))
    assert [p.name for p in drawn if p.arm] == [f"{kind}-{arm}" for arm in ("moe", "moe-matched") for kind in KINDS]
    assert {p.arm for p in drawn} == {None, "moe", "moe-matched"}


def test_the_page_shows_each_arms_experts_under_its_name(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    section = page[page.index("<h2>The experts</h2>") : page.index("<h2>Before you conclude</h2>")]
    assert re.findall(r"<h3[^>]*>(.*?)</h3>", section) == ["moe", "moe-matched"]
    assert section.count("<figure>") == 2 * len(KINDS)


def test_the_words_on_balance_have_the_last_measurements_numbers(reported: Path) -> None:
    said, last = captions(reported)["routing-moe"], final(reported)
    worst, layer = max((4 * max(load) - 1, layer) for layer, load in enumerate(last["load"]))
    means = [sum(abs(4 * share - 1) for share in load) / 4 for load in last["load"]]
    entropies = [entropy / math.log(4) for entropy in last["entropy"]]
    assert f"Max violation: at most {worst:.2f}, in layer {layer}," in said
    assert f"gets {4 * max(last['load'][layer]):.2f} times its share" in said
    assert f"Mean violation: at most {max(means):.2f}" in said
    assert f"Entropy: {min(entropies):.0%}" in said
    assert f"{max(entropies):.0%} of its largest, ln 4 = 1.39 nats" in said.replace(f"{min(entropies):.0%} to ", "")
    assert (
        f"Size of the logits (root mean square): {min(last['logit_rms']):.2f} to {max(last['logit_rms']):.2f}" in said
    )
    assert "Dropped" not in said


def test_the_words_on_norms_name_the_two_experts_that_differ_most(reported: Path) -> None:
    norms = final(reported)["weight_norm"]
    factor, layer, one, other = max(
        (norms[layer][one] / norms[layer][other], layer, one, other)
        for layer in range(4)
        for one in range(4)
        for other in range(4)
    )
    said = captions(reported)["expert-norms-moe"]
    assert f"in layer {layer}, where expert {one} has {factor:.2f} times the norm of expert {other}." in said
    assert said.endswith("none do here.")


def test_the_words_on_pairs_give_the_share_of_the_rarer_experts_tokens(reported: Path) -> None:
    said, overlap = captions(reported)["expert-pairs-moe"], final(reported)["overlap"]
    found = re.search(
        r"pair is (\d) and (\d) in layer (\d).*: (\d+)% of expert (\d)'s tokens went to expert (\d)", said
    )
    assert found is not None
    one, other, layer, share, rarer, partner = map(int, found.groups())
    assert {one, other} == {rarer, partner}
    assert overlap[layer][rarer][rarer] <= overlap[layer][partner][partner]
    assert share == round(100 * overlap[layer][one][other] / overlap[layer][rarer][rarer])


def test_the_words_on_types_name_the_expert_that_one_type_reaches_most(reported: Path) -> None:
    types = json.loads((reported / "moe-seed0" / "summary.json").read_text())["token_types"]
    said = captions(reported)["token-types-moe"]
    best = (0.0, "")
    for layer, rows in enumerate(types["layers"]):
        for expert in range(4):
            load = sum(w * row[expert] for w, row in zip(types["share_of_tokens"], rows, strict=True))
            for name, weight, row in zip(types["types"], types["share_of_tokens"], rows, strict=True):
                words = f"expert {expert} of layer {layer} gets {row[expert]:.1%} of “{name}” and {load:.1%} of all."
                best = max(best, (row[expert] / load if weight else 0.0, words))
    assert best[1] in said


def test_a_type_that_does_not_occur_is_not_shown(reported: Path) -> None:
    (shown,) = [p for p in pictures(*read_results(reported)) if p.name == "token-types-moe"]
    svg = shown.page_svg("s0")
    assert "whitespace 10%" in svg
    assert ">other" not in svg


def test_types_without_shares_or_none_at_all_are_left_out(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(arms=("dense", "moe"))
    absent = {"types": ["word", "number"], "share_of_tokens": [1, 0], "layers": [[[0.25] * 4, None]] * 4}
    run_comparison(comparison, finish(comparison, tmp_path / "some", moe={"token_types": absent}))
    assert "Were all types spread alike, 0% of a layer's slots" in captions(tmp_path / "some")["token-types-moe"]
    run_comparison(comparison, finish(comparison, tmp_path / "none", moe={"token_types": None}))
    assert "token-types-moe" not in captions(tmp_path / "none")


def test_runs_of_before_there_were_measurements_have_a_report(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(), tmp_path, moe={"token_types": None})
    rewrite(tmp_path / "moe-seed0", lambda line: line.pop("routing", None))
    page = run_comparison(small(), tmp_path).read_text()
    assert [name for name in captions(tmp_path) if name.endswith("-moe")] == ["expert-load-moe"]
    assert "Max violation" not in page
    (run,) = json.loads((tmp_path / "results.json").read_text())["arms"]["moe"]["runs"]
    assert [run[name] for name in ("max_violation", "min_load", "logit_rms", "dropped")] == [None] * 4


@pytest.mark.parametrize(
    ("moe", "layers", "kinds"),
    [
        (MoEConfig(experts=1, top_k=1), 2, {"expert-load", "routing"}),
        (MoEConfig(experts=2, top_k=1), 1, {"expert-load", "routing", "expert-norms", "token-types"}),
        (MoEConfig(experts=8, top_k=1), 2, {"expert-load", "routing", "expert-norms", "token-types"}),
        (MoEConfig(experts=64, top_k=4), 24, set(KINDS)),
        (MoEConfig(experts=8, moe_layers="every 2nd"), 6, set(KINDS)),
    ],
    ids=["one", "two", "top-1", "64-of-24-layers", "every-2nd"],
)
def test_any_number_of_experts_and_layers_is_drawn(
    small: Make, finish: Finish, tmp_path: Path, moe: MoEConfig, layers: int, kinds: set[str]
) -> None:
    comparison = small(arms=("dense", "moe"), moe=moe, model=ModelConfig(layers=layers, width=64))
    page = run_comparison(comparison, finish(comparison, tmp_path)).read_text()
    assert {name.removesuffix("-moe") for name in captions(tmp_path) if name.endswith("-moe")} == kinds
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_what_was_dropped_is_shown_only_with_a_capacity(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(arms=("dense", "moe"), moe=MoEConfig(experts=4, capacity_factor=1.0))
    finish(comparison, tmp_path)
    rewrite(tmp_path / "moe-seed0", lambda line: line.update(dropped=[0.01, 0.02, 0.08, 0.01]))
    page = run_comparison(comparison, tmp_path).read_text()
    assert "Dropped: 3.0% of all slots, at most 8.0%, in layer 2." in captions(tmp_path)["routing-moe"]
    assert ">dropped slots<" in page
    assert '<td role="cell" data-heading="Dropped"><span>3.0%</span>' in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["moe"]["runs"][0]["dropped"] == pytest.approx(0.03)
    assert results["arms"]["dense"]["runs"][0]["dropped"] is None


def test_the_arms_table_has_the_mean_of_the_worst_layers_violation(reported: Path) -> None:
    page, worst = (reported / "report.html").read_text(), []
    for seed in (0, 1):
        loads = final(reported, f"moe-seed{seed}")["load"]
        worst.append(max(4 * share - 1 for load in loads for share in load))
    cells = re.findall(r'data-heading="Max violation"><span>(.*?)</span>', page)
    assert cells[:2] == ["–", f"{sum(worst) / 2:.2f}"]
    assert 'data-heading="Dropped"' not in page


def test_healthy_routing_has_no_note(reported: Path) -> None:
    results, _ = read_results(reported)
    assert routing_notes(results) == []


@pytest.mark.parametrize(
    ("figures", "said", "helps"),
    [
        ({"max_violation": [0.2, 1.4, 0.1, 0.1]}, "the busiest expert got 2.4 times its fair share", "--bias-rate"),
        ({"load": [[0.02, 0.48, 0.25, 0.25]] * 4}, "the idlest expert got 8% of its fair share", "--balance-loss"),
        ({"logit_rms": [2.0, 60.0, 1.0, 1.0]}, "logits had a size of 60", "--z-loss"),
    ],
)
def test_unhealthy_routing_is_noted_with_its_number_and_what_helps(
    small: Make, finish: Finish, tmp_path: Path, figures: dict[str, Any], said: str, helps: str
) -> None:
    comparison = small(arms=("dense", "moe"), seeds=2)
    finish(comparison, tmp_path)
    rewrite(tmp_path / "moe-seed1", with_routing(**figures))
    page = run_comparison(comparison, tmp_path).read_text()
    (note,) = [note for note in read_results(tmp_path)[0]["words"]["notes"] if "unhealthy" in note]
    assert note.startswith("The routing of moe was unhealthy at the end in 1 of 2 seeds: ")
    assert said in note
    assert helps in note
    assert note.count("(") == 1  # nothing else is complained of
    assert said in page


def test_many_dropped_slots_are_noted() -> None:
    run = {"budget": "tokens", "max_violation": 0.1, "min_load": 0.8, "logit_rms": 1.0, "dropped": 0.06}
    (note,) = routing_notes({"arms": {"moe": {"runs": [run]}}})
    assert "unhealthy at the end: 6.0% of the slots were dropped" in note
    assert routing_notes({"arms": {"moe": {"runs": [run | {"dropped": 0.05}]}}}) == []
    assert routing_notes({"arms": {"moe": {"runs": [run | {"budget": "flops"}]}}}) == []


def test_experts_that_were_not_trained_alike_are_said_to_be(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(arms=("dense", "moe"))
    finish(comparison, tmp_path)
    rewrite(
        tmp_path / "moe-seed0", with_routing(weight_norm=[[1, 1, 1, 1], [3, 2, 1, 2], [5, 5, 5, 5], [2, 2, 2, 2.5]])
    )
    run_comparison(comparison, tmp_path)
    said = captions(tmp_path)["expert-norms-moe"]
    assert "in layer 1, where expert 0 has 3.00 times the norm of expert 2." in said
    assert said.endswith("some do here.")


@given(weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=12))
def test_pairs_drawn_by_the_experts_weights_alone_are_as_by_chance(weights: list[float]) -> None:
    overlap = np.outer(weights, weights)
    np.fill_diagonal(overlap, 0)
    overlap /= overlap.sum() / 2
    ratio, expected = pairs_over_chance(overlap)
    off = ~np.eye(len(weights), dtype=bool)
    np.testing.assert_allclose(ratio[off], 1, rtol=0.01)  # an expert in nearly every pair is found slowly
    np.testing.assert_allclose(expected, overlap, rtol=0.01)
    assert np.isnan(np.diag(ratio)).all()


def test_two_couples_that_never_part_stand_out_against_the_chance_of_equal_loads() -> None:
    overlap = np.zeros((4, 4))
    overlap[0, 1] = overlap[1, 0] = overlap[2, 3] = overlap[3, 2] = 0.5
    ratio, expected = pairs_over_chance(overlap)
    for one, other in combinations(range(4), 2):
        assert expected[one, other] == pytest.approx(1 / 6)  # six pairs, equally likely
        assert ratio[one, other] == pytest.approx(3 if (one, other) in {(0, 1), (2, 3)} else 0)


def test_an_expert_without_tokens_is_as_by_chance_and_one_in_every_pair_leaves_no_error() -> None:
    overlap = np.array([[0.0, 0.5, 0.5, 0.0], [0.5, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ratio, expected = pairs_over_chance(overlap)
    assert ratio[3, :3].tolist() == [1, 1, 1]
    np.testing.assert_allclose(expected[0, 1:3], 0.5, atol=1e-2)
    ratio, _ = pairs_over_chance(np.zeros((3, 3)))
    assert np.nanmax(np.abs(ratio - 1)) == 0


def test_types_that_share_no_expert_move_all_they_could_and_types_alike_none() -> None:
    apart, weights = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), np.array([0.5, 0.5])
    assert moved_by_type(apart, weights) == 0.5  # half of each type would go to the other's expert
    assert types_over_chance(apart, weights).tolist() == [[2, 0, 1], [0, 2, 1]]
    alike = np.array([[0.3, 0.7], [0.3, 0.7]])
    assert moved_by_type(alike, np.array([0.2, 0.6])) == pytest.approx(0)
    np.testing.assert_allclose(types_over_chance(alike, np.array([0.2, 0.6])), 1)


def test_a_comparison_of_dense_arms_says_nothing_of_experts(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = replace(small(), arms=("dense", "dense-wide"))
    page = run_comparison(comparison, finish(comparison, tmp_path)).read_text()
    assert not any(words in page for words in ("The experts", "Max violation", "max violation"))
