"""One run's page: the pictures of its method with the numbers of its files, absent files in words, names escaped."""

import csv
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_peft.reporting.page import write_report
from moe_peft.reporting.run import Run
from tests.reporting import toy_runs
from tests.reporting.toy_runs import STEPS, TASKS, ToyRun

HOSTILE = ['<script>alert("1")</script>', "a & b 'c' $x_1$", "_under #1c2024", ' id="q" onload="x()"']
ALWAYS = {"scores", "losses", "learning_curves"}
ROUTED = ALWAYS | {"expert_use", "router_history", "task_map"}
PICTURES = {
    "TRex": ROUTED | {"expert_use_by_layer", "layers", "gates", "clusters"},
    "MoRE": ROUTED | {"layers", "rank_table"},
    "TTLoRAMoE": ROUTED | {"router_confusion", "router_confidence"},
    "LoRA": ALWAYS,
}


class Reader(HTMLParser):
    """What a browser makes of a page: elements, and text as it is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.read: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.read.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.read).split())

    @property
    def figures(self) -> set[str | None]:
        return {own.get("id") for tag, own in self.elements if tag == "figure"}


def numbers(folder: Path, name: str) -> list[dict[str, str]]:
    """The CSV of a picture."""
    with (folder / "report" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A run of each method with its report; treat as read-only."""
    root = tmp_path_factory.mktemp("reports")
    toys = {method: ToyRun(root / method, method).write() for method in PICTURES}
    for toy in toys.values():
        write_report(Run(toy.folder))
    return toys


@pytest.mark.parametrize("method", PICTURES)
def test_a_method_has_its_pictures_as_figure_png_and_csv(reports, method):
    folder = reports[method].folder
    assert Reader((folder / "report.html").read_text(encoding="utf-8")).figures == PICTURES[method]
    assert {path.name for path in (folder / "report").iterdir()} == {
        f"{name}.{kind}" for name in PICTURES[method] for kind in ("png", "csv")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "report").glob("*.png"))


def test_the_page_asks_for_nothing_and_runs_nothing(reports):
    for toy in reports.values():
        page = (toy.folder / "report.html").read_text(encoding="utf-8")
        assert not re.search(r"https?:|//|@import", re.sub(r"data:image/png;base64,[^\"]*", "", page).split("<pre>")[0])
        assert not {"script", "link", "iframe", "img"} & {
            tag for tag, own in Reader(page).elements if own.get("href") != "data:,"
        }
        targets = {own["href"] for tag, own in Reader(page).elements if tag == "a"}
        assert all(str(target).startswith("#") for target in targets) and len(targets) >= 4


def test_ids_are_unique_and_every_link_has_its_target(reports):
    for toy in reports.values():
        page = (toy.folder / "report.html").read_text(encoding="utf-8")
        ids = [own["id"] for _, own in Reader(page).elements if "id" in own]
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', page)) <= set(ids)


def test_pictures_take_the_colours_of_the_page(reports):
    page = (reports["TRex"].folder / "report.html").read_text(encoding="utf-8")
    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    colors = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"base64,[^\"]*", "", svg)))
    assert colors <= {"#ffffff"} and "DejaVu" not in svg
    names = set(re.findall(r"var\((--[\w-]+)\)", svg))
    style = page[: page.index("</style>")]
    dark = style[style.index("prefers-color-scheme: dark") :]
    assert {"--ink", "--muted", "--series-0", "--sans"} <= names
    assert all(f"{name}:" in style for name in names)
    assert all(f"{name}:" in dark for name in names - {"--sans"})


def test_the_numbers_of_the_expert_pictures_are_those_that_were_recorded(reports):
    toy = reports["TRex"]
    with (toy.folder / "routing" / "use.csv").open(newline="") as file:
        test = [row for row in csv.DictReader(file) if row["split"] == "test"]
    recorded = {(row["task"], row["layer"], row["expert"]): float(row["weight"]) for row in test}
    drawn = {
        (row["task"], row["layer"], row["expert"]): float(row["share"])
        for row in numbers(toy.folder, "expert_use_by_layer")
    }
    assert drawn == pytest.approx(recorded) and len(drawn) == 3 * 12 * 6
    for row in numbers(toy.folder, "expert_use"):
        own = [value for (task, _, expert), value in recorded.items() if (task, expert) == (row["task"], row["expert"])]
        assert float(row["share"]) == pytest.approx(sum(own) / len(own))


def test_the_table_shows_points_with_a_standard_error(reports):
    toy = reports["TRex"]
    run = Run(toy.folder)
    text = Reader((toy.folder / "report.html").read_text(encoding="utf-8")).text
    for task, score in run.scores.items():
        base = run.results["rows"]["base"]["tasks"][task]["value"]
        assert re.search(rf"{task} accuracy, 250 rows {100 * base:.1f} ±3.0 .* {100 * score['value']:.1f} ±3.0", text)
    assert "against the untouched base: +7.7 points in the mean; two standard errors of the paired difference" in text
    assert "against the majority class: −1.2 points in the mean; two standard errors of the paired difference" in text


def test_without_the_base_nothing_is_said_of_it(tmp_path):
    toy = ToyRun(tmp_path / "run").write()
    content = json.loads((toy.folder / "results.json").read_text())
    content["rows"]["base"] = content["paired"]["model-base"] = "n/a"
    (toy.folder / "results.json").write_text(json.dumps(content))
    text = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8")).text
    assert "untouched base" not in text and "against the majority class" in text


def test_the_key_of_expert_use_is_in_plain_percent(tmp_path):
    toy = ToyRun(tmp_path / "run", "TTLoRAMoE").write()
    with (toy.folder / "routing" / "use.csv").open(newline="") as file:
        rows = [row | {"weight": row["chosen"]} for row in csv.DictReader(file)]
    toy.table("routing/use.csv", ",".join(rows[0]), [list(row.values()) for row in rows])
    text = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8")).text
    assert "0 even 25 100 % of the task's weight" in text


def test_the_curves_are_those_of_metrics_csv(reports):
    toy = reports["TRex"]
    loss = [row for row in numbers(toy.folder, "losses") if row["curve"] == "all tasks"]
    assert [(int(row["step"]), float(row["value"])) for row in loss] == [
        (own.step, own.value) for own in Run(toy.folder).history("train/loss")
    ]
    curves = {row["curve"] for row in numbers(toy.folder, "learning_curves")}
    assert curves == {"mean of tasks", *(f"{task}, accuracy" for task in TASKS)}


def test_the_prior_s_weight_is_one_minus_omega(reports):
    toy = reports["TRex"]
    with (toy.folder / "routing" / "gates.csv").open(newline="") as file:
        recorded = [1 - float(row["omega"]) for row in csv.DictReader(file)]
    assert [float(row["prior_weight"]) for row in numbers(toy.folder, "gates")] == pytest.approx(recorded)


def test_without_a_prior_the_gates_are_shown_as_they_are_and_no_clusters_are_missed(tmp_path):
    toy = ToyRun(tmp_path / "run", model={"use_prior": False}).write()
    (toy.folder / "routing" / "clusters.csv").unlink()
    reader = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8"))
    assert reader.figures == PICTURES["TRex"] - {"clusters"}
    assert "Not recorded" not in reader.text and "rior weight" not in reader.text
    with (toy.folder / "routing" / "gates.csv").open(newline="") as file:
        recorded = [float(row["omega"]) for row in csv.DictReader(file)]
    assert [float(row["token_weight"]) for row in numbers(toy.folder, "gates")] == pytest.approx(recorded)


def test_the_router_s_bands_hold_all_layers(reports):
    toy = reports["TRex"]
    with (toy.folder / "routing" / "summary.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["split"], row["step"]) == ("validation", str(STEPS[-1]))]
    layers = [float(row["entropy"]) for row in rows if row["layer"] != "all"]
    (mean,) = (float(row["entropy"]) for row in rows if row["layer"] == "all")
    drawn = {(row["measure"], row["split"], row["step"]): row for row in numbers(toy.folder, "router_history")}
    own = drawn["entropy", "validation", str(STEPS[-1])]
    assert [float(own[name]) for name in ("low", "mean", "high")] == pytest.approx([min(layers), mean, max(layers)])


def test_confusion_is_in_shares_of_a_task_s_rows(reports):
    rows = numbers(reports["TTLoRAMoE"].folder, "router_confusion")
    for task in TASKS:
        own = [row for row in rows if row["task"] == task]
        total = sum(float(row["rows"]) for row in own)
        assert [float(row["share"]) for row in own] == pytest.approx([float(row["rows"]) / total for row in own])
        assert len(own) == len(TASKS) + 1


def test_findings_come_first_and_collapsed_ones_before_dead_ones(tmp_path):
    toy = ToyRun(tmp_path / "run").write()
    dead = [{"kind": "dead", "layer": f"l{at % 3}", "text": f"No. {at}"} for at in range(9)]
    toy.findings([*dead, {"kind": "collapsed", "layer": "l1", "text": "all to 1,1 <b>"}])
    text = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8")).text
    assert "9 experts of 3 layers are dead and 1 router has collapsed." in text
    assert text.index("all to 1,1 <b>") < text.index("No. 0") < text.index("4 more") < text.index("No. 8")
    assert text.index("No. 8") < text.index("Results TRex against")


def test_without_findings_the_page_says_so(reports):
    text = Reader((reports["TRex"].folder / "report.html").read_text(encoding="utf-8")).text
    assert "No expert is dead, and no router has collapsed." in text


@pytest.mark.parametrize("method", ["TRex", "TTLoRAMoE", "MoRE"])
def test_hostile_names_are_text_everywhere(tmp_path, method):
    toy = ToyRun(tmp_path / "r<u>n", method, HOSTILE).write()
    toy.findings([{"kind": "dead", "layer": "l", "expert": "<i>", "share": 0.0, "text": f"{HOSTILE[0]} is dead"}])
    page = write_report(Run(toy.folder)).read_text(encoding="utf-8")
    reader = Reader(page)
    assert reader.figures == PICTURES[method]
    assert "script" not in {tag for tag, _ in reader.elements}
    assert not any(name.startswith("on") for _, own in reader.elements for name in own)
    shown = {html.unescape(text) for text in re.findall(r"<text [^>]*>([^<]*)</text>", page)}
    assert shown >= {" ".join(name.split()) for name in HOSTILE[1:3]}  # the others are cut, for they are long
    assert {row["task"] for row in numbers(toy.folder, "scores")} == {*HOSTILE, "mean"}


def test_a_run_of_real_size_stays_small(tmp_path, monkeypatch):
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [f"model.layers.{block}.{kind}" for block in range(30) for kind in kinds]
    monkeypatch.setitem(toy_runs.EXPERTS, "TRex", [f"{i},{j}" for i in range(4) for j in range(4)])
    toy = ToyRun(tmp_path / "run", tasks=[f"task {at}" for at in range(5)], layers=layers).write()
    page = write_report(Run(toy.folder))
    assert page.stat().st_size < 1_000_000
    assert page.read_text(encoding="utf-8").count("<image") > 5 * 7
