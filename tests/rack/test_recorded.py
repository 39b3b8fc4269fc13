"""What the README says of recorded comparisons is what their packed fits say, and the tables come out of them again."""

import json
import math
import tarfile
from pathlib import Path
from statistics import fmean, stdev

import pytest

from moe_peft.rack.archive import unpack
from moe_peft.rack.preparing import prepare
from moe_peft.rack.settings import read_comparison
from moe_peft.rack.tables import write_tables
from moe_peft.reporting.run import Run

ROOT = Path(__file__).parents[2]
COMPARISONS = ROOT / "configs" / "compare"
TITLES = {
    "minilm-13": "### Recorded: thirteen tasks, one budget",
    "smollm2-8": "### Recorded: eight tasks and SmolLM2, one budget",
}


def rows_of(text):
    """The rows of a text's first table, by their first cell."""
    lines = iter(line for line in text.splitlines() if line.startswith("|"))
    next(lines)
    found = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name.strip("`") in found or not name:
            break
        found[name.strip("`")] = cells
    return {name: cells for name, cells in found.items() if not name.startswith("---")}


def readme_rows(title):
    """The rows of a section's first table."""
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n{title}\n")
    assert found, f"README.md has no section {title!r}"
    return rows_of(rest.partition("\n#")[0])


@pytest.fixture
def recorded(tmp_path, request):
    """The folders of a comparison's packed fits, by tag."""
    with tarfile.open(COMPARISONS / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return {folder.name: sorted(folder.iterdir()) for folder in tmp_path.iterdir()}


def points(scores):
    """Scores of some seeds as a table has them."""
    error = f" ±{100 * stdev(scores) / math.sqrt(len(scores)):.1f}" if len(scores) > 1 else ""
    return f"{100 * fmean(scores):.1f}{error}"


@pytest.mark.parametrize("recorded, name", [(name, name) for name in TITLES], indirect=["recorded"])
def test_the_readme_s_table_is_that_of_the_packed_fits(recorded, name):
    rows, about = readme_rows(TITLES[name]), {}
    comparison = read_comparison(COMPARISONS / f"{name}.yaml")
    first, *later = comparison.seeds
    for tag, folders in recorded.items():
        every = [(folder, json.loads((folder / "rack.json").read_text())) for folder in folders]
        about[tag] = [(Run(folder), own) for folder, own in every if own["finished"]]
    whole = len(comparison.rates) + len(later)
    assert rows.keys() == {tag for tag, fits in about.items() if len(fits) == whole}
    for tag, (mean, *_, rate, adapters) in rows.items():
        fits = about[tag]
        tried = {own["learning_rate"]: run.results["validation"]["value"] for run, own in fits if own["seed"] == first}
        best = max(tried, key=tried.__getitem__)
        scores = [run.results["rows"]["model"]["mean"] for run, own in fits if own["learning_rate"] == best]
        assert tried.keys() == set(comparison.rates) and len(scores) == len(comparison.seeds)
        assert mean == points(scores), tag
        assert rate == f"{best:g}" and adapters == f"{fits[0][1]['adapter_parameters']:,}", tag
        assert all(len(commit) == 12 for _, own in fits for commit in own["commits"]), "with uncommitted code"


@pytest.mark.parametrize("name, title", TITLES.items())
def test_the_readme_s_differences_are_those_of_the_recorded_tables(name, title):
    recorded = rows_of((COMPARISONS / f"{name}.md").read_text(encoding="utf-8"))
    for tag, (mean, difference, *_) in readme_rows(title).items():
        label = next(own for own in recorded if own.partition(" (")[0] == tag)
        assert recorded[label][:2] == [mean, difference], tag


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_the_recorded_tables_come_out_of_the_packed_fits(name, data_root, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").symlink_to(data_root)
    monkeypatch.chdir(tmp_path)
    contest = prepare(Path(f"configs/compare/{name}.yaml"), ["--data.root=data"])
    new, strange, finished = unpack(contest, Path(f"configs/compare/{name}.tar.xz"))
    assert new == finished > 0 and not strange
    page = write_tables(contest, contest.comparison.out)
    made = page.with_suffix(".md").read_text(encoding="utf-8")
    assert made == (COMPARISONS / f"{name}.md").read_text(encoding="utf-8")
