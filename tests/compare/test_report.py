"""The page: complete, self-contained, and of one mind with results.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from moelab.compare import Comparison, run_comparison, write_report
from moelab.compare.figures import pictures
from moelab.compare.picture import DARK, LIGHT
from moelab.compare.results import read_results
from moelab.compare.routing_pictures import tint
from moelab.config import ModelConfig, MoEConfig, UsageError

Finish = Callable[..., Path]
Make = Callable[..., Comparison]


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the cells of tables by row and heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: dict[str, dict[str, str]] = {}
        self.cells: dict[str, str] = {}
        self.heading: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in {"meta", "link"}:
            self.open.append(tag)
        if tag == "tr":
            self.cells = {}
        self.heading = found.get("data-heading", self.heading) if tag in {"td", "span", "small"} else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, text: str) -> None:
        if "tr" in self.open and self.heading and text.strip():
            self.cells[self.heading] = (self.cells.get(self.heading, "") + " " + text.strip()).strip()
        elif self.open[-1:] == ["span"] and "th" in self.open:
            self.rows.setdefault(text, self.cells)


@pytest.fixture(scope="module")
def reported(small: Make, finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison over three seeds, at all budgets, with its report."""
    folder = tmp_path_factory.mktemp("reported")
    comparison = small(seeds=3, budgets=("tokens", "flops", "seconds"))
    run_comparison(comparison, finish(comparison, folder), command="moelab compare smoke --seeds 3")
    return folder


def of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_page_asks_for_nothing_outside_of_itself(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag != "script"
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), f"{tag} {name}={value}"
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_every_figure_of_the_arms_table_is_that_of_the_results(reported: Path) -> None:
    page = Page((reported / "report.html").read_text())
    for arm, found in of(reported)["arms"].items():
        runs = [run for run in found["runs"] if run["budget"] == "tokens"]
        losses = [run["val_loss"] for run in runs]
        bits = [run["val_bits_per_byte"] for run in runs]
        cells = page.rows[arm]
        assert cells["Validation loss"] == f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
        assert cells["Bits per byte"] == f"{np.mean(bits):.4f} ± {np.std(bits, ddof=1):.4f}"
        assert read(cells["Parameters"]) == pytest.approx(found["parameters"]["total"], rel=5e-3)
        assert read(cells["Active"]) == pytest.approx(found["parameters"]["active"], rel=5e-3)
        assert read(cells["FLOPs per token"].removesuffix("FLOP")) == pytest.approx(found["flops_per_token"], rel=5e-3)
        assert read(cells["Tokens/s"]) == pytest.approx(runs[0]["tokens_per_second"], rel=5e-3)
        assert cells["MFU"] == "–"  # not measured: no number, and not zero
        assert cells["Peak memory"] == f"{runs[0]['peak_memory_bytes'] / 2**20:.0f} MiB"
        assert "Word perplexity" not in cells


def read(quantity: str) -> float:
    number, _, prefix = quantity.partition(" ")
    return float(number) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[prefix]


def test_every_difference_is_that_of_the_results(reported: Path) -> None:
    page = Page((reported / "report.html").read_text())
    headings = {"tokens": "At equal tokens", "flops": "At equal training FLOPs", "seconds": "In equal training time"}
    for entry in of(reported)["comparisons"]:
        cell = page.rows[f"{entry['arm']} against {entry['against']}"][headings[entry["budget"]]].replace("−", "-")
        low, high = entry["ci95"]
        assert cell.startswith(f"{entry['difference']:+.3f} 95% interval {low:+.3f} to {high:+.3f}, 3 seeds")
        assert cell.endswith("both end there")


def test_what_the_same_loss_cost_is_that_of_the_results(reported: Path) -> None:
    section = (reported / "report.html").read_text().partition("How soon the same loss</h2>")[2]
    page = Page(section.partition("</section>")[0])
    headings = {"tokens": "Tokens", "flops": "Training FLOPs", "seconds": "Training time"}
    for entry in of(reported)["to_reach"]:
        cell = page.rows[f"{entry['arm']} against {entry['against']}"][headings[entry["budget"]]]
        low, high = entry["ci95"]
        assert cell.startswith(f"{entry['ratio']:.2f} × 95% interval {low:.2f} to {high:.2f}")


def test_every_run_is_listed_with_its_figures(reported: Path) -> None:
    page = Page((reported / "report.html").read_text())
    for arm in of(reported)["arms"].values():
        for run in arm["runs"]:
            cells = page.rows[run["folder"]]
            assert cells["Tokens"] == f"{run['tokens']:,}"
            assert cells["Validation loss"] == f"{run['val_loss']:.4f}"


def test_the_page_says_how_to_make_it_again_and_what_was_held_equal(reported: Path) -> None:
    text, results = (reported / "report.html").read_text(), of(reported)
    facts = ["moelab compare smoke --seeds 3", results["data"]["fingerprint"], "bpe:4096", "2.13.0", "a CPU, 2 threads"]
    assert all(fact in text for fact in facts + list(results["batches_sha256"].values()))
    assert all(sentence in text for sentence in results["words"]["headline"])


def test_what_was_read_off_is_marked_and_explained_and_a_single_run_says_so(
    small: Make, finish: Finish, tmp_path: Path
) -> None:
    text = run_comparison(small(), finish(small(), tmp_path)).read_text()
    cell = Page(text).rows["moe against dense"]["At equal training FLOPs"]
    assert "one run: no interval" in cell
    assert cell.endswith("read off")
    assert "A loss read off before its schedule has ended is higher than that of a run that ends there." in text
    assert "In this single run" in text


def test_figures_are_also_files_that_stand_alone(reported: Path) -> None:
    names = {path.name for path in (reported / "figures").iterdir()}
    shown = ["differences", "difference-over-tokens", "loss-tokens", "loss-flops", "loss-seconds"]
    shown += [f"{name}-moe" for name in ("expert-load", "routing", "expert-norms", "expert-pairs", "token-types")]
    assert names == {f"{name}.{form}" for name in shown for form in ("svg", "png")}
    assert (reported / "figures" / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert "var(--" not in (reported / "figures" / "differences.svg").read_text()


def test_every_colour_of_a_figure_follows_the_page(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        drawn = re.sub(r'xlink:href="data:[^"]*"', "", svg)  # the heat map's own tints, over either background
        legend = {"#d95e00", "#2178c4"}
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= legend


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_arms_have_contrast_on_their_background(palette: dict[str, str]) -> None:
    def luminance(colour: str) -> float:  # WCAG 2.2, relative luminance
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    behind = luminance(palette["surface"])
    for name in [name for name in palette if name.startswith("arm-")] + ["ink", "muted"]:
        light, dark = sorted([luminance(palette[name]), behind], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_colours_of_the_two_schemes_are_named_alike_and_told_apart() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_a_balanced_expert_has_no_tint_and_a_starved_or_doubled_one_all() -> None:
    assert tint(np.array([1.0, 0.0, 2.0, 3.0]))[:, 3].tolist() == [0, 1, 1, 1]
    assert tint(np.array([0.5]))[0, 2] > tint(np.array([1.5]))[0, 2]  # bluer below, and not only paler


def test_a_report_is_written_again_from_its_folder_alone(reported: Path) -> None:
    first = (reported / "report.html").read_text()
    (reported / "report.html").unlink()
    assert write_report([reported]) == reported / "report.html"
    assert (reported / "report.html").read_text() == first


def test_several_comparisons_share_a_page_with_a_section_each(
    small: Make, finish: Finish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        run_comparison(small(), finish(small(), tmp_path / name))
    monkeypatch.chdir(tmp_path)
    page = write_report([tmp_path / "a", tmp_path / "b"])
    assert page.resolve() == tmp_path / "report.html"
    elements = Page(page.read_text()).elements
    assert [found["id"] for tag, found in elements if tag == "article"] == ["s0", "s1"]
    ids = [found["id"] for _, found in elements if found.get("id")]
    assert len(ids) == len(set(ids))


def test_a_folder_that_is_not_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a comparison"):
        write_report([tmp_path])


def test_a_page_that_cannot_be_written_is_refused(reported: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_report([reported], reported / "results.json" / "page.html")


def test_names_are_text_and_not_markup(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(), tmp_path)
    for path in tmp_path.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        summary["data"]["name"] = "text:<b>&"
        path.write_text(json.dumps(summary))
    text = run_comparison(small(), tmp_path, command="moelab --out '<i>'").read_text()
    assert "text:&lt;b&gt;&amp;" in text
    assert "<i>" not in text


def test_the_form_of_the_text_and_its_source_are_said(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(), tmp_path)
    for path in tmp_path.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        summary["data"] |= {"form": "tokenised form, as published", "source": "a/hub at 0123"}
        path.write_text(json.dumps(summary))
    page = run_comparison(small(), tmp_path).read_text()
    assert "<dd>tokenised form, as published</dd>" in page
    assert "<dd>a/hub at 0123</dd>" in page


def test_word_perplexity_has_a_column_where_it_was_measured(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(), tmp_path, moe={"val_word_perplexity": 31.4159})
    page = Page(run_comparison(small(), tmp_path).read_text())
    assert (page.rows["moe"]["Word perplexity"], page.rows["dense"]["Word perplexity"]) == ("31.42", "–")


def test_experts_of_some_layers_are_shown_under_those_layers_numbers(
    small: Make, finish: Finish, tmp_path: Path
) -> None:
    comparison = small(moe=MoEConfig(experts=1, top_k=1, moe_layers="1,2,5"), model=ModelConfig(layers=6))
    comparison = replace(comparison, arms=("dense", "moe"))
    page = run_comparison(comparison, finish(comparison, tmp_path)).read_text()
    assert [number for number in range(6) if f">layer {number}<" in page] == [1, 2, 5]


def test_pictures_of_one_folder_are_the_same_twice(reported: Path) -> None:
    drawn = [[picture.page_svg("s0") for picture in pictures(*read_results(reported))] for _ in range(2)]
    assert drawn[0] == drawn[1]
