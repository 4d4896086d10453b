"""One picture of a report: its colours, its style, and its forms.

A picture is drawn by matplotlib in the colours of `LIGHT`. As a file of its own it keeps them; inside of the page each
colour becomes a CSS variable, so that the page's light and dark forms recolour it. A figure is 5 inches wide, 360 units
of an SVG: about the width of a phone's page, where its text is then shown at the size it was drawn at.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# The first six are the arms', told apart with the common forms of colour blindness, and by line and marker as well.
# Each must occur once: `page_svg` tells them apart by their value.
LIGHT = {
    "arm-0": "#0064a6",
    "arm-1": "#c14a00",
    "arm-2": "#00785b",
    "arm-3": "#9a3f80",
    "arm-4": "#7a5c01",
    "arm-5": "#444b55",
    "ink": "#1b1f24",
    "muted": "#59626e",
    "line": "#d9dde3",
    "surface": "#fffffe",
}
DARK = {
    "arm-0": "#6db9f2",
    "arm-1": "#ff9b5e",
    "arm-2": "#41cfa1",
    "arm-3": "#e79ccf",
    "arm-4": "#dfc052",
    "arm-5": "#b9c1ca",
    "ink": "#e7eaef",
    "muted": "#a5afbc",
    "line": "#343b46",
    "surface": "#14171c",
}
ARM_COLOURS = [colour for name, colour in LIGHT.items() if name.startswith("arm-")] * 4

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": LIGHT["ink"],
    "axes.grid": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": LIGHT["surface"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.8,
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def new_figure(height: float) -> Figure:
    """An empty figure of the width that all have, `height` inches high."""
    return Figure(figsize=(5, height), layout="constrained")


@dataclass(frozen=True)
class Picture:
    """One figure of a report."""

    name: str
    title: str
    caption: str
    figure: Figure
    arm: str | None = None
    """The arm whose experts it is about, if it is about one."""

    def files(self) -> dict[str, bytes]:
        """The figure by itself, by file name: SVG and PNG in the light colours."""
        return {f"{self.name}.{form}": self._drawn(form, transparent=False) for form in ("svg", "png")}

    def page_svg(self, section: str) -> str:
        """The figure for a page: its colours CSS variables, its ids unlike those of other sections' figures."""
        svg = self._drawn("svg", transparent=True, salt=section).decode()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and their names recur in every figure
        for name, colour in LIGHT.items():
            svg = svg.replace(colour, f"var(--{name})")
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert size is not None
        head = f'<svg role="img" aria-label="{escape(self.title)}" viewBox="{size[0][9:-1]}" class="figure"'
        return re.sub(r"<svg[^>]*", head, svg, count=1)

    def _drawn(self, form: str, transparent: bool, salt: str = "") -> bytes:
        drawn = io.BytesIO()
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{salt}/{self.name}"}):
            facts: dict[str, None] = {"Date": None} if form == "svg" else {}
            self.figure.savefig(drawn, format=form, dpi=200, transparent=transparent, metadata=facts)
        if form == "png":
            return drawn.getvalue()
        return re.sub(r"'DejaVu Sans'[^;\"]*", FONT, drawn.getvalue().decode()).encode()
