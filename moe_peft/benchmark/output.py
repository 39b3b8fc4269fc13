"""What the benchmark found, as tables on the screen and as files: CSV, JSON, a plot."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from moe_peft.benchmark.figures import Figures
from moe_peft.benchmark.suite import EXPERTS, growth_of
from moe_peft.benchmark.targets import Rule, Verdict

Rows = Sequence[dict[str, Any]]
STABLE = ("job", "dtype", "variant", *Figures._fields)
UNSTABLE = ("peak_bytes",)
CSV = "results.csv"


def write_csv(path: Path, rows: Rows, columns: Sequence[str]) -> None:
    """Writes rows; what a row lacks is left empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_figures(path: Path, rows: Rows) -> None:
    """Writes what depends on no machine: the committed table."""
    write_csv(path, rows, [name for name in STABLE if name not in UNSTABLE])


def write_all(folder: Path, settings: dict[str, Any], sections: dict[str, Rows], verdicts: Sequence[Verdict]) -> None:
    """Writes results.csv, targets.csv, results.json and results.png."""
    rows = [{"section": section, **row} for section, found in sections.items() for row in found]
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "ratio_to"))
    write_csv(folder / CSV, rows, columns)
    write_csv(folder / "targets.csv", [verdict._asdict() for verdict in verdicts], Verdict._fields)
    plain = {
        section: [row | {"ratio_to": {name: list(ratio) for name, ratio in row["ratio_to"].items()}} for row in found]
        for section, found in sections.items()
    }
    content = {"settings": settings, "targets": [verdict._asdict() for verdict in verdicts], **plain}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(folder / "results.png", sections, verdicts)


def plot(path: Path, sections: dict[str, Rows], verdicts: Sequence[Verdict]) -> None:
    """Draws a panel per section: ratios with their targets, growth, step and decoding times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(sections), 1, figsize=(10, 4 * len(sections)), squeeze=False, layout="constrained"
    )
    for axis, (section, rows) in zip(axes[:, 0], sections.items(), strict=True):
        if section == "adapter":
            _ratios(axis, verdicts)
        elif section == "growth":
            _growth(axis, rows)
        else:
            names = [row["variant"] for row in rows]
            axis.barh(names, [row["median_us"] / 1000 for row in rows])
            axis.set_xlabel(f"ms per {rows[0]['job']}, median")
            axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _ratios(axis: Any, verdicts: Sequence[Verdict]) -> None:
    names = list(dict.fromkeys(verdict.row for verdict in verdicts))
    for verdict in verdicts:
        at = names.index(verdict.row)
        axis.plot([verdict.low, verdict.high], [at, at], color="0.6")
        axis.plot(verdict.ratio, at, "o", color="tab:blue" if verdict.met is not False else "tab:red")
        if verdict.target is not None:
            axis.plot(verdict.target, at, "|", color="black", markersize=14)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("time ratio, median and quartiles; bar: target")
    axis.invert_yaxis()


def _growth(axis: Any, rows: Rows) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        method, count = growth_of(row["variant"])
        if count:
            lines.setdefault(f"{method}, {row['job']}", []).append((count, row["median_us"] / 1000))
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), "o--" if "backward" in name else "o-", label=name)
    axis.set_xscale("log")
    axis.set_xticks(EXPERTS, map(str, EXPERTS))
    axis.minorticks_off()
    axis.set_xlabel("experts, pairs or tasks")
    axis.set_ylabel("ms per batch, median")
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def target_table(verdicts: Sequence[Verdict], rules: Sequence[Rule]) -> Table:
    """Lays out DESIGN's targets."""
    table = Table("row", "setting", title="targets", title_justify="left", box=box.SIMPLE)
    for name in ("ratio", "quartiles", "target", "met?"):
        table.add_column(name, justify="right", no_wrap=True)
    said = {True: "yes", False: "NO", None: "-"}
    for one in verdicts:
        target = "-" if one.target is None else f"{one.target:.2f}"
        spread = f"{one.low:.2f} .. {one.high:.2f}"
        table.add_row(one.row, one.setting, f"{one.ratio:.2f}", spread, target, said[one.met])
    for rule in rules:
        table.add_row(rule.rule, rule.worst, "", "", "exact", said[rule.met])
    return table


def times_table(rows: Rows, references: Sequence[str]) -> Table:
    """Lays out the times of one job, with ratios to those references that are there."""
    names = {row["variant"] for row in rows}
    references = [name for name in references if name in names]
    title = ", ".join(f"{row[0]}{row[1]}" for row in _setting(rows[0]))
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("variant", no_wrap=True)
    figures = ("operations", "GFLOP", "kept kB") if "operations_forward" in rows[0] else ()
    for name in ("min µs", "median µs", *(f"/ {name}" for name in references), "parameters", *figures):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[name]:,.0f}" for name in ("min_us", "median_us")]
        cells += [f"{row['ratio_to'][name].median:.2f}" for name in references]
        cells.append(f"{row['parameters']:,}" if "parameters" in row else "")
        if figures:
            cells += [f"{row['operations_forward']}+{row['operations_backward']}"]
            cells += [f"{(row['flops_forward'] + row['flops_backward']) / 1e9:.3f}", f"{row['kept_bytes'] / 1000:,.0f}"]
        table.add_row(row["variant"], *cells)
    return table


def _setting(row: dict[str, Any]) -> list[tuple[str, Any]]:
    found = [("", row["job"]), ("d=", row["width"])] if "width" in row else [("", row["job"])]
    return [*found, ("", row["dtype"]), ("rows ", row["rows"]), ("tokens ", row["tokens"])]


def jobs(rows: Rows) -> list[Rows]:
    """Splits a section's rows into those that were timed in turns."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["job"], row.get("width"), row["dtype"]), []).append(row)
    return list(found.values())
