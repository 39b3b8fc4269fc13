"""The report of a run that was really trained, tiny as it is: nothing is missing, also where it is rebuilt."""

import csv
import shutil
from pathlib import Path

import pytest

from moe_peft.reporting.page import write_report
from moe_peft.reporting.run import Run
from tests.reporting.chromium import Chromium, Tab
from tests.reporting.test_browser import FIGURES, browser  # noqa: F401
from tests.reporting.test_page import PICTURES, Reader, numbers
from tests.tiny_fits import whole  # noqa: F401
from tests.tiny_runs import world  # noqa: F401

pytestmark = pytest.mark.slow


def recorded(folder: Path) -> dict[tuple[str, ...], float]:
    """The weights of the test rows."""
    with (folder / "routing" / "use.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    return {(row["task"], row["layer"], row["expert"]): float(row["weight"]) for row in rows}


def drawn(folder: Path) -> dict[tuple[str, ...], float]:
    """The shares in the picture."""
    rows = numbers(folder, "expert_use_by_layer")
    return {(row["task"], row["layer"], row["expert"]): float(row["share"]) for row in rows}


@pytest.fixture(scope="module")
def folder(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A copy of the run."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("copy") / "run"))


def test_a_fit_leaves_all_that_a_report_shows(folder: Path, browser: Chromium):  # noqa: F811
    page = write_report(Run(folder))
    reader = Reader(page.read_text(encoding="utf-8"))
    assert reader.figures == PICTURES["TRex"]
    assert "Not recorded" not in reader.text and "rebuild" not in reader.text and "Unfinished" not in reader.text
    assert drawn(folder) == pytest.approx(recorded(folder), abs=2e-6) and len(drawn(folder)) == 2 * 14 * 6
    tab = Tab(browser, page, 390, dark=True)
    for figure in tab.evaluate(FIGURES):
        assert (figure["empty"], figure["outside"], figure["over"]) == (0, 0, 0), figure
    assert tab.complaints() == [] and tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.close()


def test_what_was_not_recorded_is_rebuilt_from_the_checkpoint(folder: Path, run_tool):
    before = recorded(folder)
    shutil.rmtree(folder / "routing")
    assert "expert_use" not in Reader(write_report(Run(folder)).read_text(encoding="utf-8")).figures
    status, out, errors = run_tool("report", "--rebuild", "--rows", 8, folder)  # as many as the fit records
    assert (status, out, errors) == (0, [f"Written to {folder}/report.html."], [])
    assert Reader((folder / "report.html").read_text(encoding="utf-8")).figures == PICTURES["TRex"]
    assert drawn(folder) == pytest.approx(before, abs=1e-5)
