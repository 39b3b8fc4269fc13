"""The pages as a reader sees them: opened in a headless Chromium, on a desk and on a phone, light and dark."""

from pathlib import Path
from typing import Any

import pytest

from moe_peft.reporting.comparison_page import write_comparison
from moe_peft.reporting.page import write_report
from moe_peft.reporting.run import Run
from tests.reporting.chromium import Chromium, Tab, find_chromium
from tests.reporting.test_page import HOSTILE, PICTURES
from tests.reporting.toy_runs import TASKS, ToyRun

pytestmark = pytest.mark.slow

PHONE, DESK = 390, 1280
FIGURES = """[...document.querySelectorAll('figure')].map(figure => {
    const box = figure.querySelector('svg').getBoundingClientRect(), scroll = figure.querySelector('.scroll')
    const texts = [...figure.querySelectorAll('svg text')].map(text => text.getBoundingClientRect())
    const over = texts.filter((one, at) => texts.slice(at + 1).some(other =>
        Math.min(one.right, other.right) - Math.max(one.left, other.left) > 2 &&
        Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 4)).length
    const parts = [...figure.querySelectorAll('svg text, svg image')].map(part => part.getBoundingClientRect())
    return {name: figure.id, width: box.width, height: box.height, shown: scroll.clientWidth, all: scroll.scrollWidth,
            left: box.left, over, parts: parts.length, empty: parts.filter(part => !part.width || !part.height).length,
            outside: parts.filter(part => part.left < box.left - 1 || part.right > box.right + 1
                                       || part.top < box.top - 1 || part.bottom > box.bottom + 1).length}})"""
IMAGES = """Promise.all([...document.querySelectorAll('svg image')].map(async image => {
    const copy = new Image(); copy.src = image.href.baseVal; await copy.decode(); return copy.naturalWidth}))"""
COLORS = """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
    ...[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill)]"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium for all tests."""
    command = find_chromium()
    if command is None:
        pytest.skip("no Chromium here: install one, or say where it is with CHROMIUM")
    running = Chromium(command, tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of every method, one of hostile names, and a comparison."""
    root = tmp_path_factory.mktemp("pages")
    toys = {method: ToyRun(root / method, method).write() for method in PICTURES}
    toys["hostile"] = ToyRun(root / "hostile", "TTLoRAMoE", HOSTILE).write()
    found = {name: write_report(Run(toy.folder)) for name, toy in toys.items()}
    seeds = [
        ToyRun(root / f"seed{seed}", tasks=[*TASKS, "a task with a rather long name"], seed=seed) for seed in (1, 2)
    ]
    return found | {"comparison": write_comparison([Run(toy.write().folder) for toy in seeds], root / "out")}


def luminance(color: str) -> float:
    """Of a colour as computed styles give it, 0 to 1."""
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Of two colours, 1 to 21, as WCAG counts."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def expected(name: str) -> set[str]:
    """The pictures of a page."""
    if name == "comparison":
        return {"compared_scores", "compared_curves", "compared_routers"}
    return PICTURES["TTLoRAMoE" if name == "hostile" else name]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_figure_is_seen_and_nothing_is_asked_for(
    browser: Chromium, pages: dict[str, Path], width: int, dark: bool
):
    for name, page in pages.items():
        tab = Tab(browser, page, width, dark=dark)
        figures: list[dict[str, Any]] = tab.evaluate(FIGURES)
        assert {figure["name"] for figure in figures} == expected(name)
        for figure in figures:
            assert figure["width"] > 200 and figure["height"] > 100, figure
            assert figure["parts"] >= 3, figure
            assert (figure["empty"], figure["outside"], figure["over"]) == (0, 0, 0), (name, figure)
            assert figure["left"] >= 0 and figure["shown"] <= width
        images = tab.evaluate(IMAGES)
        assert all(images) and (name in ("LoRA", "comparison") or len(images) >= 3)
        assert [address for address in tab.requests() if not address.startswith("data:")] == [page.as_uri()]
        assert tab.complaints() == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        tab.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_the_ground_in_either_scheme(browser: Chromium, pages: dict[str, Path], dark: bool):
    for name in ("TRex", "comparison"):
        tab = Tab(browser, pages[name], DESK, dark=dark)
        ground, *texts = tab.evaluate(COLORS)
        assert (luminance(ground) < 0.1) == dark
        # White is the text on cells of full colour.
        assert min(contrast(ground, text) for text in texts if text != "rgb(255, 255, 255)") >= 4.5
        assert len(texts) > 50
        tab.close()


def test_a_wide_figure_scrolls_in_its_own_box_on_a_phone(browser: Chromium, pages: dict[str, Path]):
    tab = Tab(browser, pages["TRex"], PHONE)
    (scores,) = (figure for figure in tab.evaluate(FIGURES) if figure["name"] == "scores")
    assert scores["all"] > scores["shown"] > PHONE - 40
    moved = "const box = document.querySelector('#scores .scroll'); box.scrollLeft = 80; [box.scrollLeft, scrollX]"
    assert tab.evaluate(moved) == [80, 0]
    tab.close()


def test_the_configuration_opens_when_asked_for(browser: Chromium, pages: dict[str, Path]):
    tab = Tab(browser, pages["LoRA"], PHONE)
    seen = "document.querySelector('pre').checkVisibility()"
    assert tab.evaluate(seen) is False
    assert tab.evaluate(f"document.querySelector('summary').click(); {seen}") is True
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE
    tab.close()
