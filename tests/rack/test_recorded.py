"""What the README says of recorded comparisons is what their packed fits say."""

import json
import math
import tarfile
from pathlib import Path
from statistics import fmean, stdev

import pytest

from moe_peft.reporting.run import Run

ROOT = Path(__file__).parents[2]
TITLES = {"minilm-13": "### Recorded: thirteen tasks, one budget"}


def readme_rows(title):
    """The rows of a section's first table whose first cell is code, by that."""
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n{title}\n")
    assert found, f"README.md has no section {title!r}"
    lines = [line for line in rest.partition("\n#")[0].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.fixture
def recorded(tmp_path, request):
    """The folders of a comparison's packed fits, by tag."""
    with tarfile.open(ROOT / "configs" / "compare" / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return {folder.name: sorted(folder.iterdir()) for folder in tmp_path.iterdir()}


@pytest.mark.parametrize("recorded, title", TITLES.items(), indirect=["recorded"])
def test_the_table_is_that_of_the_packed_fits(recorded, title):
    rows = readme_rows(title)
    complete = {tag for tag, folders in recorded.items() if len({Run(folder).seed for folder in folders}) == 3}
    assert rows.keys() == complete
    for tag, (mean, *_, rate, adapters) in rows.items():
        runs = [Run(folder) for folder in recorded[tag]]
        about = [json.loads((run.folder / "rack.json").read_text()) for run in runs]
        tried = [max(own.value for own in run.history("val/mean")) for run in runs if run.seed == 0]
        rates = [own["learning_rate"] for own in about if own["seed"] == 0]
        best = rates[tried.index(max(tried))]
        scores = [
            run.results["rows"]["model"]["mean"]
            for run, own in zip(runs, about, strict=True)
            if own["learning_rate"] == best
        ]
        assert len(scores) == 3
        assert mean == f"{100 * fmean(scores):.1f} ±{100 * stdev(scores) / math.sqrt(3):.1f}", tag
        assert rate == f"{best:g}" and adapters == f"{about[0]['adapter_parameters']:,}", tag
        assert all(len(own["commit"]) == 12 for own in about), "recorded with uncommitted code"
