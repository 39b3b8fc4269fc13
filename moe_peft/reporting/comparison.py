"""Runs side by side: those that differ by their seed only are one contestant, with mean and spread over the seeds."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from moe_peft.reporting.run import Run

ASIDE = ("seed_everything", "ckpt_path", "weights_only", "results", "predictions")
"""Sections of a configuration that say where a run lies or how often it was repeated, not what was trained."""
ASIDE_OF_TRAINER = ("default_root_dir", "logger", "enable_progress_bar", "enable_model_summary")
MOST_DIFFERENCES = 3
"""That a label names, unless it takes more to tell two contestants apart."""
REFERENCES = ("majority", "base")


class Spread(NamedTuple):
    """A number over seeds."""

    mean: float
    sd: float | None
    """Standard deviation over seeds (n - 1); None for a single one."""
    values: list[float]


class Contestant(NamedTuple):
    """A method with one configuration, and its runs."""

    label: str
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        """The runs whose scores count."""
        return [run for run in self.runs if run.finished]

    def score(self, task: str) -> Spread | None:
        """A task's score over the finished runs."""
        return spread([run.scores[task]["value"] for run in self.finished])

    def mean(self) -> Spread | None:
        """The mean over tasks, over the finished runs."""
        return spread([run.results["rows"]["model"]["mean"] for run in self.finished if run.results])

    def fact(self, name: str) -> Spread | None:
        """One of the numbers that results.json has of a whole run."""
        found = [run.results.get(name) for run in self.finished if run.results]
        return spread([value for value in found if value is not None])


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None for no values."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, list(values))


def contestants(runs: Sequence[Run]) -> list[Contestant]:
    """Groups runs by method and configuration, and labels each group by what tells it from others of its method.

    Raises:
        ValueError: runs over different tasks, rows or bases, or the same run twice.
    """
    check_alike(runs)
    groups: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        plain = setting(run)
        groups.setdefault(repr(sorted(plain.items())), (plain, []))[1].append(run)
    found = list(groups.values())
    return [Contestant(label(plain, own[0], found), own) for plain, own in found]


def check_alike(runs: Sequence[Run]) -> None:
    """Refuses what cannot be compared: a run with itself, other bases, or what `check_scores` refuses.

    Raises:
        ValueError: one line that names two runs and their difference.
    """
    seen: dict[str, Run] = {}
    for run in runs:
        other = seen.setdefault(str(run.folder.resolve()), run)
        if other is not run:
            raise ValueError(f"runs: '{run.folder}' is given twice; name every run once")
    first = runs[0]
    for run in runs:
        if run.base != first.base:
            raise ValueError(
                f"runs: '{run.folder}' is on base {run.base!r}, '{first.folder}' on {first.base!r}; compare runs of "
                "one base"
            )
    check_scores(runs)


def check_scores(runs: Sequence[Run]) -> None:
    """Refuses scores that cannot be compared: of other tasks, by other metrics, or on other rows.

    Raises:
        ValueError: one line that names two runs and their difference.
    """
    scored = [run for run in runs if run.scores]
    for run in scored:
        first = scored[0]
        if set(run.scores) != set(first.scores):
            raise ValueError(
                f"runs: '{run.folder}' has the tasks {', '.join(run.scores)}, '{first.folder}' has "
                f"{', '.join(first.scores)}; compare runs over the same tasks"
            )
        for task, score in run.scores.items():
            there = first.scores[task]
            if (score["metric"], score["n"]) != (there["metric"], there["n"]):
                raise ValueError(
                    f"runs: '{run.folder}' scored {task} by {score['metric']} on {score['n']} rows, '{first.folder}' "
                    f"by {there['metric']} on {there['n']}; compare runs over the same test rows"
                )


def setting(run: Run) -> dict[str, str]:
    """What was trained, as dotted names and values: the configuration without seeds and places."""
    config = {name: value for name, value in run.config.items() if name not in ASIDE}
    trainer, data = config.get("trainer"), config.get("data")
    if isinstance(trainer, dict):
        config["trainer"] = {name: value for name, value in trainer.items() if name not in ASIDE_OF_TRAINER}
    if isinstance(data, dict) and isinstance(data.get("init_args"), dict):
        own = {name: value for name, value in data["init_args"].items() if name != "seed"}
        config["data"] = data | {"init_args": own}
    return flat(config)


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested settings as dotted names; `init_args` is left out of the names."""
    if isinstance(value, Mapping) and value:
        parts = {key: "" if key == "init_args" else str(key) for key in value}
        return {
            own: text
            for key, part in parts.items()
            for own, text in flat(value[key], ".".join(filter(None, (name, part)))).items()
        }
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {own: text for at, item in enumerate(value) for own, text in flat(item, f"{name}.{at}").items()}
    return {name: str(value)}


def label(plain: Mapping[str, str], run: Run, groups: Sequence[tuple[Mapping[str, str], list[Run]]]) -> str:
    """The method's name, and the settings that tell it from other contestants of the same method."""
    rivals = [other for other, runs in groups if runs[0].method == run.method and other is not plain]
    differing = [
        name
        for name in dict.fromkeys([*plain, *(name for other in rivals for name in other)])
        if any(other.get(name) != plain.get(name) for other in rivals)
    ]
    if not differing:
        return run.method
    names = differing[:MOST_DIFFERENCES]
    for other in rivals:  # no two labels may be equal
        if all(other.get(name) == plain.get(name) for name in names):
            names.append(next(name for name in differing if other.get(name) != plain.get(name)))
    shown = [f"{name.removeprefix('model.').removeprefix('data.')} {plain.get(name, 'unset')}" for name in names]
    more = len(differing) - len(shown)
    return f"{run.method} ({', '.join(shown)}{f', {more} more' if more else ''})"


def references(runs: Sequence[Run]) -> dict[str, dict[str, Spread | None]]:
    """Scores of the majority class and of the untouched base by task, and their mean; the same in every run."""
    found: dict[str, dict[str, Spread | None]] = {}
    for name in REFERENCES:
        rows = [run.results["rows"].get(name) for run in runs if run.finished and run.results]
        known = [row for row in rows if isinstance(row, dict) and isinstance(row.get("mean"), float)]
        if known:
            tasks = {task: spread([row["tasks"][task]["value"] for row in known]) for task in known[0]["tasks"]}
            found[name] = tasks | {"mean": spread([row["mean"] for row in known])}
    return found


def as_json(found: Sequence[Contestant], tasks: Sequence[str]) -> dict[str, Any]:
    """The comparison as plain types."""

    def plain(own: Spread | None) -> dict[str, Any] | None:
        return None if own is None else own._asdict()

    return {
        "base": found[0].runs[0].base,
        "tasks": list(tasks),
        "references": {
            name: {task: plain(own) for task, own in row.items()}
            for name, row in references([run for one in found for run in one.runs]).items()
        },
        "contestants": [
            {
                "label": one.label,
                "method": one.runs[0].method,
                "runs": [{"folder": str(run.folder), "seed": run.seed, "finished": run.finished} for run in one.runs],
                "tasks": {task: plain(one.score(task)) for task in tasks},
                "mean": plain(one.mean()),
                "trainable_parameters": plain(one.fact("trainable_parameters")),
                "wall_seconds": plain(one.fact("wall_seconds")),
            }
            for one in found
        ],
    }
