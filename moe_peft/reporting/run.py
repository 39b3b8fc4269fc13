"""A run folder, read: what it was trained with, what it scored, what its routing was."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from moe_peft.reporting.records import (
    Cluster,
    Confidence,
    Gate,
    Metric,
    Point,
    Rank,
    Summary,
    Use,
    each_line,
    latest,
    of_best_split,
    read_records,
)

UNROUTED = ("LoRA", "TTLoRA")
"""Methods without a router, as far as is known before a run was tested."""


def read_json(path: Path, kind: type) -> Any:
    """Reads a file of a run; None where there is none.

    Raises:
        ValueError: it holds nothing of this kind.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, kind):
        raise ValueError(f"run: '{path}' is damaged; write it again, or delete it")
    return content


def read_results(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """Reads a fit's own results; without them those of the newest test of a checkpoint.

    Returns:
        The file and what it holds, or None and None.

    Raises:
        ValueError: a damaged file.
    """
    tests = sorted(folder.glob("results.test-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (folder / "results.json", *tests):
        content = read_json(path, dict)
        if content is not None:
            if "model" not in content.get("rows", {}):
                raise ValueError(f"run: '{path}' has no row of the model; test the run again, or delete it")
            return path, content
    return None, None


class Run:
    """What a run folder holds; everything but its configuration may be absent.

    Args:
        folder: the folder that a fit wrote.

    Raises:
        ValueError: no run's folder, or a file in it that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.config_text, self.config = self._read_config()
        self.results_file, self.results = read_results(self.folder)
        routing = self.folder / "routing"
        self._histories: dict[str, list[Metric]] = {}
        for metric in read_records(self.folder / "metrics.csv", Metric):
            self._histories.setdefault(metric.name, []).append(metric)
        self.use = latest(routing / "use.csv", Use)
        self.summary = read_records(routing / "summary.csv", Summary)
        self.gates = read_records(routing / "gates.csv", Gate)
        self.clusters = read_records(routing / "clusters.csv", Cluster)
        self.ranks = read_records(routing / "ranks.csv", Rank) or self._ranks_in_use()
        self.confidence = read_records(routing / "confidence.csv", Confidence)
        self.points = read_records(routing / "embedding.csv", Point)
        self.confusion = list(each_line(routing / "confusion.csv")) or self._confusion_in_use()
        self.findings: list[dict[str, Any]] | None = read_json(routing / "findings.json", list)

    def _read_config(self) -> tuple[str, dict[str, Any]]:
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise ValueError(
                f"run: '{self.folder}' has no config.yaml, so it is no run's folder; give what `fit` wrote"
            )
        text = path.read_text(encoding="utf-8")
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError:
            config = None
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise ValueError(f"run: '{path}' is no configuration of a fit (no model section); give what `fit` wrote")
        return text, config

    def _ranks_in_use(self) -> list[Rank]:
        """MoRE's ranks as its routing has them, for a run without RankReport."""
        if self.method != "MoRE":
            return []
        used = [record for record in of_best_split(self.use) if record.chosen == 1]
        return [Rank(own.task, own.layer, int(own.expert.removeprefix("r"))) for own in used]

    def _confusion_in_use(self) -> list[list[str]]:
        """Who was sent to whom of the rows that were recorded, for a run of TT-LoRA MoE without RoutingConfusion."""
        used = of_best_split(self.use) if self.method == "TTLoRAMoE" else []
        if not used:
            return []
        experts = list(dict.fromkeys(record.expert for record in used))
        rows = {(record.task, record.expert): str(round(record.chosen * record.tokens)) for record in used}
        tasks = dict.fromkeys(record.task for record in used)
        return [["task", *experts], *([task, *(rows[task, expert] for expert in experts)] for task in tasks)]

    # ---- what the run is --------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the fit has come to its end and was tested."""
        return self.results_file is not None and self.results_file.name == "results.json"

    @property
    def method(self) -> str:
        """The method's class, by its bare name."""
        return str(self.config["model"].get("class_path", "unknown method")).rpartition(".")[2]

    @property
    def model(self) -> dict[str, Any]:
        """The method's arguments."""
        return self.config["model"].get("init_args") or {}

    @property
    def base(self) -> str:
        """The backbone's name, as the configuration has it."""
        return str(((self.model.get("backbone") or {}).get("init_args") or {}).get("name", "unknown backbone"))

    @property
    def seed(self) -> Any:
        """The seed of everything."""
        return self.config.get("seed_everything") if self.results is None else self.results.get("seed")

    @property
    def place(self) -> str:
        """The folder as a shell reads it."""
        return shlex.quote(str(self.folder))

    @property
    def unrouted(self) -> str:
        """Why there is no routing to tell of; empty where there is one."""
        if self.model.get("routing") == "oracle":
            return f"This {self.method} sends every row to its own task's expert (routing: oracle): nothing to route."
        unrouted = self.method in UNROUTED if self.results is None else not self.results.get("routes", True)
        return f"{self.method} has no router: nothing decides who serves a row." if unrouted else ""

    @property
    def has_prior(self) -> bool:
        """Whether a semantic prior has a part in the routing."""
        return bool(self.model.get("use_prior", self.method == "TRex"))

    @property
    def steps(self) -> int | None:
        """The last step that was logged; None for none."""
        return max((history[-1].step for history in self._histories.values()), default=None)

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """The model's score of every task; nothing where there are no results."""
        return {} if self.results is None else self.results["rows"]["model"]["tasks"]

    @property
    def curves(self) -> dict[tuple[str, str], list[Metric]]:
        """The validation's metrics over training by task and metric, in the tasks' order."""
        found: dict[tuple[str, str], list[Metric]] = {}
        for name, history in self._histories.items():
            if name.startswith("val/") and not name.startswith("val/router/"):
                task, _, kind = name.removeprefix("val/").rpartition("/")
                if task:
                    found[task, kind] = history
        return found

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks as far as the run has got to them."""
        return list(self.scores or dict.fromkeys(task for task, _ in self.curves))

    def history(self, name: str) -> list[Metric]:
        """One number's history."""
        return self._histories.get(name, [])
