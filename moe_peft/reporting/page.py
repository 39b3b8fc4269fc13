"""One run as a page: what there is to know first, then its numbers as pictures, then how it was made."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_peft.reporting import experts, html, methods, routers, training
from moe_peft.reporting.drawing import Picture, drawing
from moe_peft.reporting.files import PICTURES, write_page
from moe_peft.reporting.html import Raw, Section, Shown, code, paragraph, sentence
from moe_peft.reporting.results import results
from moe_peft.reporting.routing import ALL, shares
from moe_peft.reporting.run import Run
from moe_peft.reporting.words import duration, many

FINDINGS_AT_ONCE = 6


def write_report(run: Run, out: Path | None = None) -> Path:
    """Writes a run's page, its pictures and their numbers.

    Args:
        run: the run.
        out: the folder to write into; None takes the run's own.

    Returns:
        The page.
    """
    with drawing():
        pictures: list[Picture] = []
        content = render(run, pictures)
    return write_page((out or run.folder) / "report.html", content, pictures)


def render(run: Run, pictures: list[Picture]) -> str:
    """Makes the page's text.

    Args:
        run: the run.
        pictures: the list that the page's pictures are added to.
    """

    def shown(picture: Picture | None) -> list[Raw]:
        if picture is None:
            return []
        pictures.append(picture)
        return [html.figure(picture, PICTURES)]

    sections = [
        Section("findings", "What to know", findings(run)),
        Section("results", "Results", results(run, shown)),
        Section("experts", "Experts", expert_use(run, shown)),
        Section("routing", "Routing", routing(run, shown)),
        Section("training", "Training", curves(run, shown)),
        Section("setup", "Setup", setup(run)),
    ]
    return html.page(f"{run.name}: {run.method} on {run.base}", heading(run), sections)


def heading(run: Run) -> list[Raw]:
    """Who the run is."""
    results = run.results or {}
    parameters, seconds = results.get("trainable_parameters"), results.get("wall_seconds")
    pairs = [
        ("tasks", len(run.tasks) or "unknown"),
        ("seed", "none" if run.seed is None else run.seed),
        ("steps", "unknown" if run.steps is None else f"{run.steps:,}"),
        ("trainable parameters", "unknown" if parameters is None else f"{parameters:,}"),
        ("training took", "unknown" if seconds is None else duration(seconds)),
        ("version", f"moe_peft {results.get('versions', {}).get('moe_peft', 'unknown')}"),
    ]
    head = [
        Raw(f"<h1>{html.text(run.name)}</h1>"),
        paragraph(f"{run.method} on {run.base}", "subtitle"),
        html.facts(pairs),
    ]
    if not run.finished:
        after = "" if run.steps is None else f"; its last logged step is {run.steps:,}"
        resume = f"python -m moe_peft fit --config {run.place}/config.yaml --ckpt_path last"
        warning = "<strong>Unfinished</strong>: this run has no results.json{}. Go on with {}."
        head.append(Raw(f'<div class="banner">{sentence(warning, after, code(resume))}</div>'))
    return head


def rebuild(run: Run) -> Raw:
    """The command that makes up for routing that was not recorded."""
    return code(f"python tools/report.py --rebuild {run.place}")


def findings(run: Run) -> list[Raw]:
    """Dead experts and collapsed routers, in words."""
    if run.findings is None:
        if run.unrouted:
            return [paragraph(run.unrouted, "absent")]
        words = "Whether experts are dead or routers have collapsed is not known; {} finds out from the checkpoint."
        return [paragraph(sentence(words, rebuild(run)), "absent")]
    if not run.findings:
        return [paragraph("No expert is dead, and no router has collapsed.")]
    found = sorted(run.findings, key=lambda finding: finding["kind"] != "collapsed")
    items = [
        sentence('<li><span class="kind">{}</span><span>{}</span></li>', finding["kind"], finding["text"])
        for finding in found
    ]
    first, rest = items[:FINDINGS_AT_ONCE], items[FINDINGS_AT_ONCE:]
    blocks = [paragraph(counted(run.findings)), Raw(f'<ul class="findings">{"".join(first)}</ul>')]
    if rest:
        more = f'<details><summary>{len(rest)} more</summary><ul class="findings">{"".join(rest)}</ul></details>'
        blocks.append(Raw(more))
    return blocks


def counted(found: Sequence[dict[str, Any]]) -> str:
    """How many experts are dead in how many layers, and how many routers have collapsed."""
    dead = [finding["layer"] for finding in found if finding["kind"] == "dead"]
    collapsed = len(found) - len(dead)
    says = [
        f"{many(len(dead), 'expert')} of {many(len(set(dead)), 'layer')} {'is' if len(dead) == 1 else 'are'} dead",
        f"{many(collapsed, 'router')} {'has' if collapsed == 1 else 'have'} collapsed",
    ]
    text = " and ".join(say for say, count in zip(says, (len(dead), collapsed), strict=True) if count)
    return text[0].upper() + text[1:] + "."


def expert_use(run: Run, shown: Shown) -> list[Raw]:
    """Which expert served which task, on the whole and layer by layer."""
    if run.unrouted and not run.use:
        return []
    used = shares(run.use)
    if used is None:
        words = "No routing was recorded, so there is no picture of who serves which task; {} makes it."
        return [paragraph(sentence(words, rebuild(run)), "absent")]
    blocks = shown(experts.use_by_task(used))
    if used.layers != [ALL] and not run.ranks:  # MoRE's rank table says the same, better
        blocks += shown(experts.use_by_layer(used))
    return blocks


def routing(run: Run, shown: Shown) -> list[Raw]:
    """How the routers came to decide, and what belongs to the method alone."""
    blocks: list[Raw] = []
    if run.summary:
        blocks += shown(experts.router_history(run.summary)) + shown(experts.layers_at_a_glance(run.summary))
    prior, confusion = run.has_prior, run.confusion[1:] and run.confusion
    own: list[tuple[bool, Any, Callable[..., Picture], str]] = [
        (run.method == "MoRE", run.ranks, methods.rank_table, "the ranks that each task chose"),
        (run.method == "TRex", run.gates, partial(methods.gates, prior=prior), "each layer's gates"),
        (prior, run.clusters, methods.cluster_occupancy, "which clusters of the prior hold which task"),
        (run.method == "TTLoRAMoE", confusion, routers.confusion, "where the router sends each task's rows"),
        (run.method == "TTLoRAMoE", run.confidence, routers.confidence, "how sure the router was"),
        (False, run.points, methods.task_map, "a map of the tasks"),
    ]
    absent = [] if run.summary else ["entropy and mutual information"]
    for wanted, records, draw, what in own:
        if records:
            blocks += shown(draw(records))
        elif wanted:
            absent.append(what)
    if absent and not run.unrouted:
        blocks.append(paragraph(sentence("Not recorded: {}; {} writes it.", ", ".join(absent), rebuild(run)), "absent"))
    return blocks


def curves(run: Run, shown: Shown) -> list[Raw]:
    """The learning curves."""
    pictures = [*shown(training.losses(run)), *shown(training.learning_curves(run))]
    if not pictures:
        if run.steps is not None:
            return [paragraph("There are no curves in metrics.csv yet.", "absent")]
        words = "There is no metrics.csv: the run was logged elsewhere; leave {} out to have it."
        return [paragraph(sentence(words, code("trainer.logger")), "absent")]
    return pictures


def setup(run: Run) -> list[Raw]:
    """Configuration, versions and files."""
    versions = (run.results or {}).get("versions", {})
    checkpoint = (run.results or {}).get("checkpoint")
    blocks: list[Raw] = []
    if versions:
        blocks.append(paragraph(", ".join(f"{name} {version}" for name, version in versions.items()) + "."))
    if checkpoint:
        blocks.append(paragraph(sentence("Scored checkpoint: {}.", code(checkpoint))))
    words = "Pictures and the numbers that were drawn: {}; what was recorded: {} and {}."
    files = sentence(words, code(f"{PICTURES}/"), code("routing/"), code("metrics.csv"))
    return [*blocks, paragraph(files), html.folded("config.yaml", run.config_text)]
