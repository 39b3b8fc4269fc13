"""The results of a test as numbers (JSON), as a page (Markdown) and as a table on the screen.

Three rows on the same test rows: the untouched base, the majority class of the train split, and the model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe_peft.data.tasks import TaskSpec
from moe_peft.metrics import Row, score_row
from moe_peft.paired_metrics import paired_difference
from moe_peft.predictions import Prediction, Ranking
from moe_peft.writing import as_markdown

ROWS = ("base", "majority", "model")
MISSING = "n/a"


@dataclass(frozen=True, slots=True)
class Gain:
    """Difference of two macro means over the same rows, and its standard error."""

    difference: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reader must know of a run to compare it."""

    method: str
    backbone: dict[str, Any]
    seed: int | None
    trainable_parameters: int
    wall_seconds: float | None
    checkpoint: str | None
    validation: dict[str, Any] | None
    """What was monitored during the fit that this test follows, and its value for the checkpoint that is tested."""
    versions: dict[str, str]
    ranking: Ranking
    notes: dict[str, str] = field(default_factory=dict)
    routes: bool = True
    """Whether a router decided anything."""


class Report:
    """Scores of the three rows and the model's paired gains over the other two.

    Args:
        facts: the run.
        specs: the tasks.
        predictions: of base, majority and model; None for a row that cannot be had. A row that misses some of the
            model's tasks shows the others, and has no mean and no gain.
    """

    def __init__(
        self, facts: Facts, specs: Sequence[TaskSpec], predictions: dict[str, list[Prediction] | None]
    ) -> None:
        self.facts = facts
        self.rows = self._score(specs, predictions, facts.ranking)
        self.second: Ranking = "per_char" if facts.ranking == "sum" else "sum"
        self.secondary = self._score(specs, predictions, self.second)
        self.gains: dict[str, Gain | None] = {}
        for other in ("base", "majority"):
            row, answers, model = self.rows[other], predictions.get(other), predictions["model"]
            self.gains[other] = None
            if row is not None and row.mean is not None and answers and model:
                self.gains[other] = Gain(*paired_difference(specs, model, answers, facts.ranking))

    @staticmethod
    def _score(
        specs: Sequence[TaskSpec], predictions: dict[str, list[Prediction] | None], ranking: Ranking
    ) -> dict[str, Row | None]:
        rows: dict[str, Row | None] = {}
        for name in ROWS:
            answers = predictions.get(name)
            rows[name] = score_row(specs, answers, ranking) if answers else None
        model = rows["model"]
        assert model is not None  # a test without rows has failed before
        for name, row in rows.items():
            if row is not None and row.tasks.keys() != model.tasks.keys():
                rows[name] = Row(None, None, row.tasks)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        facts = asdict(self.facts)
        facts = {key: facts.pop(key) for key in ("method", "backbone", "seed", "trainable_parameters")} | facts
        return facts | {
            "rows": {name: self._row_dict(row) for name, row in self.rows.items()},
            "paired": {
                f"model-{other}": MISSING if gain is None else asdict(gain) for other, gain in self.gains.items()
            },
            "secondary": {
                "ranking": self.second,
                "rows": {
                    name: MISSING if row is None or row.mean is None else {"mean": row.mean, "stderr": row.stderr}
                    for name, row in self.secondary.items()
                },
            },
        }

    @staticmethod
    def _row_dict(row: Row | None) -> dict[str, Any] | str:
        if row is None:
            return MISSING
        values = asdict(row)
        for score in values["tasks"].values():
            if not score["beside"]:
                del score["beside"]
        return values if row.mean is not None else values | {"mean": MISSING, "stderr": MISSING}

    def gain_line(self) -> str:
        """The gain over the better of base and majority, in points."""
        means = {name: row.mean for name in self.gains if (row := self.rows[name]) is not None and row.mean is not None}
        if not means:
            return "No row to compare with: neither base nor majority covers all tasks."
        best = max(means, key=lambda name: means[name])
        gain = self.gains[best]
        assert gain is not None
        among = f" (the better of {' and '.join(means)})" if len(means) > 1 else ""
        return (
            f"{self.facts.method} over {best}{among}: {100 * gain.difference:+.1f} "
            f"points (2 standard errors of the paired difference: {200 * gain.stderr:.1f})"
        )

    def lines(self) -> list[str]:
        """What is said below the table."""
        notes: dict[str, list[str]] = {}
        for task, note in self.facts.notes.items():
            notes.setdefault(note, []).append(task)
        means = [
            f"{self._label(name)} {100 * row.mean:.1f}"
            for name, row in self.secondary.items()
            if row is not None and row.mean is not None
        ]
        return [
            self.gain_line(),
            f"Mean with options ranked by {self.second} instead of {self.facts.ranking}: {', '.join(means)}.",
            *self._beside(),
            *(f"{note}: {', '.join(tasks)}." for note, tasks in notes.items()),
        ]

    def _beside(self) -> list[str]:
        """What the metrics are that stand beside a task's primary one."""
        model = self.rows["model"]
        assert model is not None
        lines = []
        for task, score in model.tasks.items():
            rows = {name: row.tasks[task] for name, row in self.rows.items() if row is not None and task in row.tasks}
            for metric in score.beside:
                values = [f"{self._label(name)} {100 * own.beside[metric]:.1f}" for name, own in rows.items()]
                lines.append(f"{task} {metric}: {', '.join(values)}.")
        return lines

    def _label(self, name: str) -> str:
        return self.facts.method if name == "model" else name

    def _header(self) -> list[str]:
        model = self.rows["model"]
        assert model is not None
        return [f"{task} {score.metric} n={score.n}" for task, score in model.tasks.items()]

    def _cells(self, name: str) -> list[str]:
        """One cell per task, then the mean: points ± one standard error."""
        row, model = self.rows[name], self.rows["model"]
        assert model is not None
        scores = [None if row is None else row.tasks.get(task) for task in model.tasks]
        cells = [MISSING if score is None else f"{100 * score.value:.1f} ±{100 * score.stderr:.1f}" for score in scores]
        if row is None or row.mean is None or row.stderr is None:
            return [*cells, MISSING]
        return [*cells, f"{100 * row.mean:.1f} ±{100 * row.stderr:.1f}"]

    def to_markdown(self) -> str:
        """The content of results.md."""
        facts = self.facts
        header = ["", *self._header(), "mean"]
        table = [header, *([self._label(name), *self._cells(name)] for name in ROWS)]
        wall = "unknown" if facts.wall_seconds is None else f"{facts.wall_seconds:.0f} s"
        return "\n".join(
            [
                f"# {facts.method} on {facts.backbone.get('name', 'unknown backbone')}",
                "",
                *as_markdown(table),
                "",
                "Points (100 is perfect) ± one standard error; the mean is over tasks.",
                "",
                *(f"- {line}" for line in self.lines()),
                f"- {facts.trainable_parameters:,} trainable parameters; seed {facts.seed}; training took {wall}.",
                f"- Checkpoint: {facts.checkpoint or 'none'}.",
                f"- {', '.join(f'{name} {version}' for name, version in facts.versions.items())}.",
                "",
            ]
        )

    def print(self, console: Console | None = None) -> None:
        """Shows the table; as plain ASCII, not folded to a screen's width, where the output is no terminal."""
        console = console or Console()
        plain = not console.is_terminal
        width = 160 if plain else console.width
        console = Console(file=console.file, width=width) if plain else console
        per_table = max(1, (width - len(self.facts.method) - 22) // 17)
        header, cells = self._header(), {name: self._cells(name) for name in ROWS}
        for start in range(0, len(header), per_table):
            stop = min(start + per_table, len(header))
            table = Table(box=box.ASCII if plain else box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("", no_wrap=True)
            for title in [*header[start:stop], *(["mean"] if stop == len(header) else [])]:
                table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
            for name in ROWS:
                own = cells[name][start:stop] + (cells[name][-1:] if stop == len(header) else [])
                table.add_row(self._label(name), *own)
            console.print(table, markup=False, highlight=False)
        for line in self.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
