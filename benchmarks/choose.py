"""Makes the table that `auto` chooses backends by (`moelab.experts.choice`) from what `moelab bench layer` measured.

    moelab bench layer --precision bf16 --json bf16.json        # and again for other --experts, --tokens, --precision
    python benchmarks/choose.py bf16.json fp32.json …           # writes src/moelab/experts/measured.json

All files of one class of devices must come from one machine and one version; what the table had of that class before is
replaced, what it has of others is kept. Only backends of `choice.ORDER` are taken, with the time
that ÷ twin is of: the kernels' on a GPU, wall time on a CPU, of one layer forward and backward. Prints
what `auto` will pick.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moelab.experts.choice import ORDER, TABLE

FACTS = ("device", "moelab", "torch", "triton", "cuda", "driver")


def measured(file: Path) -> tuple[str, str, dict[str, Any], list[list[Any]]]:
    """Class of devices, date, what was measured on and with, and rows [precision, T, D, F, E, K, {backend: ms}]."""
    results = json.loads(file.read_text())
    environment, settings = results["environment"], results["settings"]
    times: dict[int, dict[str, float]] = {}
    for row in results["rows"]:
        if row["backend"] in ORDER and "wall_ms" in row:
            times.setdefault(row["width"], {})[row["backend"]] = float(f"{row['busy_ms'] or row['wall_ms']:.4g}")
    facts = {name: environment[name] for name in FACTS if environment.get(name)}
    rows = [
        [
            environment["precision"], results["tokens"], width, max(1, round(settings["multiple"] * width)),
            settings["experts"], settings["top_k"], dict(sorted(ms.items(), key=lambda pair: pair[1])),
        ]
        for width, ms in times.items()
    ]  # fmt: skip
    asked = {name: settings[name] for name in ("activation", "bias", "routing", "rounds", "steps")}
    return results["devices"], results["date"], facts | asked, rows


def written(table: dict[str, Any]) -> str:
    """The table as JSON, a line a row."""
    classes = []
    for devices, entry in sorted(table.items()):
        facts = "".join(f"    {json.dumps(name)}: {json.dumps(entry[name])},\n" for name in entry if name != "rows")
        rows = ",\n".join(f"      {json.dumps(row)}" for row in entry["rows"])
        classes.append(f'  {json.dumps(devices)}: {{\n{facts}    "rows": [\n{rows}\n    ]\n  }}')
    return "{\n" + ",\n".join(classes) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--table", type=Path, default=TABLE)
    settings = parser.parse_args()
    made: dict[str, Any] = {}
    for file in settings.files:
        devices, date, facts, rows = measured(file)
        entry = made.setdefault(devices, facts | {"rows": []})
        if different := [name for name, value in facts.items() if entry[name] != value]:
            parser.error(f"{file}: {different[0]} = {facts[different[0]]}: other files have {entry[different[0]]}")
        entry["rows"] += rows
        entry["date"] = max(date, entry.get("date", date))
    for entry in made.values():
        entry["rows"].sort(key=lambda row: (row[0], row[4], row[5], row[2], row[3], row[1]))
    kept = json.loads(settings.table.read_text()) if settings.table.exists() else {}
    settings.table.write_text(written(kept | made))
    for devices, entry in made.items():
        print(f"{devices}: {len(entry['rows'])} rows from {entry['device']}")
        for precision, tokens, width, hidden, experts, top_k, ms in entry["rows"]:
            shown = ", ".join(f"{name} {value:g} ms" for name, value in ms.items())
            print(f"  {precision} T = {tokens:,} D = {width} F = {hidden} E = {experts} K = {top_k}: {shown}")


if __name__ == "__main__":
    main()
