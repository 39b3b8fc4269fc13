"""Runs rows through a module and watches where they are routed.

The rows are of the form that training sees, prompt and right answer in one, a fixed few of every task: numbers of
different steps, processes and days can be compared. Nothing is kept but sums.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.functional import pad

from moe_peft.agreement import from_all_ranks
from moe_peft.batch import Batch, real_tokens
from moe_peft.context import Observer, Routing
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.tasks import Split
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.evaluation import CONFIDENCE
from moe_peft.routing import tables
from moe_peft.routing.numbers import Asked, Finding, LayerUse, findings, measure, project
from moe_peft.routing.sums import RoutingSums
from moe_peft.sharding import release

ROWS = 16
"""Of one forward: memory for one layer's weights of all their tokens is all that watching takes."""


class Place(NamedTuple):
    """One process among those that share the work."""

    ranks: int = 1
    rank: int = 0


class Recording:
    """What was seen of some rows' routing.

    Args:
        module: whose.
    """

    def __init__(self, module: MultitaskModule) -> None:
        self.module = module
        self.sums = RoutingSums(len(module.specs))
        self.clusters = 0
        """K of the semantic prior."""
        self.nearest: Counter[tuple[int, int]] = Counter()
        """Rows by task and the cluster that they are most similar to."""
        self.asked: dict[str, Asked] = {}
        """By row, of a router for whole rows."""
        self.vectors: dict[int, Tensor] = {}
        """[d + 1] by task: the sum of what its prompts were read as, and how many they are."""
        self.landmarks: list[tuple[str, str, Tensor]] = []
        self.gates: dict[str, tuple[float, float]] = {}

    def take(self, batch: Batch, counted: Tensor, mapped: bool) -> None:
        """Takes what the facts of a batch say that went through the module.

        Args:
            batch: the batch.
            counted: [B] bool, False for a row that is there to fill up.
            mapped: whether to ask what the prompts are read as.
        """
        context, own = self.module.context, batch["task_id"].tolist()
        which, rows = counted.nonzero().flatten().tolist(), len(own)
        prior, sure, chosen = (context.get(name, rows) for name in ("prior", CONFIDENCE, "task_id"))
        if prior is not None:
            self.clusters, most = prior.shape[1], prior.argmax(1).tolist()
            self.nearest.update((own[at], most[at]) for at in which)
        if sure is not None and chosen is not None:
            values, experts = sure.tolist(), chosen.tolist()
            self.asked |= {batch["row_id"][at]: Asked(own[at], values[at], experts[at] == own[at]) for at in which}
        vectors = self.module.prompt_vectors(batch) if mapped else None
        if vectors is not None:
            counts = pad(vectors.double().cpu(), (0, 1), value=1.0)
            for at in which:
                self.vectors[own[at]] = self.vectors.get(own[at], 0) + counts[at]

    def join(self, mapped: bool) -> None:
        """Joins what all ranks saw, and asks the module for what it knows without rows; all ranks must call."""
        self.sums.join()
        parts = from_all_ranks((self.nearest, self.asked, self.vectors))
        self.nearest, self.asked, self.vectors = Counter(), {}, {}
        for nearest, asked, vectors in parts:
            self.nearest += nearest
            self.asked |= asked
            for task, vector in vectors.items():
                self.vectors[task] = self.vectors.get(task, 0) + vector
        self.gates = self.module.routing_gates()
        self.landmarks = self.module.landmarks() if mapped else []

    def write(self, folder: Path, step: int, split: Split) -> tuple[dict[str, LayerUse], list[Finding]]:
        """Writes all files, and returns the numbers of every layer and what is wrong with them.

        Args:
            folder: the run's `routing/`.
            step: of the weights.
            split: of the rows.
        """
        uses, tasks = measured(self.module, self.sums), [spec.name for spec in self.module.specs]
        faults = findings(uses, self.module.task_decides)
        tables.write_use(folder, step, split, tasks, uses)
        tables.write_summary(folder, tables.summary_rows(step, split, uses))
        tables.write_findings(folder, faults)
        tables.write_gates(folder, step, self.gates)
        tables.write_clusters(folder, split, tasks, self.clusters, self.nearest)
        tables.write_confidence(folder, split, tasks, list(self.asked.values()))
        points = [(tasks[task], "task", sums[:-1] / sums[-1]) for task, sums in sorted(self.vectors.items())]
        points += self.landmarks
        if points:
            tables.write_map(folder, [point[:2] for point in points], *project([point[2] for point in points]))
        return uses, faults


@torch.no_grad()
def record(
    module: MultitaskModule,
    data: MultitaskDataModule,
    split: Split,
    rows_per_task: int,
    place: Place,
    mapped: bool = False,
) -> Recording:
    """Runs rows through a module as it is and returns what was seen, over all ranks, which must all call.

    Nothing of the module changes, and no random number is drawn that anybody else would have got.

    Args:
        module: built.
        data: where the rows are from.
        split: of which split.
        rows_per_task: so many of every task at most, spread evenly over the split.
        place: this process's.
        mapped: whether to find the places of tasks and clusters on a map too.
    """
    found, training = Recording(module), module.training
    with isolate_rng():
        module.eval()
        try:
            for batch, counted in share(data, split, rows_per_task, place):
                batch, counted = move_data_to_device((batch, counted), module.device)
                module.context.observe(observer(module, batch, found.sums, counted))
                module(batch)
                found.take(batch, counted, mapped)
        finally:
            module.context.observe(None)
            module.train(training)
            release(module)
    found.join(mapped)
    return found


def share(data: MultitaskDataModule, split: Split, rows_per_task: int, place: Place) -> Iterator[tuple[Batch, Tensor]]:
    """Yields a process's batches, as many as every other one's, and which of their rows count [B]."""
    rows = sorted(sample(data.rows(split), rows_per_task), key=lambda row: -len(row.prompt) - len(row.answer))
    filled = rows + rows[:1] * (-len(rows) % place.ranks)
    own = range(place.rank, len(filled), place.ranks)
    for start in range(0, len(own), ROWS):
        part = own[start : start + ROWS]
        batch = data.collator.train([filled[at] for at in part], float(len(part)), float(len(part)))
        yield batch, torch.tensor([at < len(rows) for at in part])


def sample(rows: Sequence[EncodedRow], per_task: int) -> list[EncodedRow]:
    """Takes so many rows of every task at most, spread evenly over them, so that sorted files are no matter."""
    found: list[EncodedRow] = []
    for task in sorted({row.task_id for row in rows}):
        own = [row for row in rows if row.task_id == task]
        count = min(per_task, len(own))
        found += [own[at * len(own) // count] for at in range(count)]
    return found


def observer(module: MultitaskModule, batch: Batch, sums: RoutingSums, counted: Tensor | None = None) -> Observer:
    """Returns what adds up the routing of a batch's real tokens, layer by layer, as it is made.

    Args:
        module: the module.
        batch: about to go through it.
        sums: to add to.
        counted: [B] bool, False for rows to leave out.
    """
    seq2seq = module.backbone.kind == "seq2seq"

    def see(slot: str, routing: Routing) -> None:
        real = real_tokens(batch, slot, seq2seq)
        real = real if counted is None else real & counted.unsqueeze(1)
        sums.add(slot, routing.weights, batch["task_id"], real)

    return see


def measured(module: MultitaskModule, sums: RoutingSums) -> dict[str, LayerUse]:
    """Returns the numbers of every layer of which a token was seen: one whose weights are all zero routes nothing."""
    return {
        layer: measure(table.numpy(), module.expert_names(layer, table.shape[1] // 2), module.task_decides)
        for layer, table in sums.layers.items()
        if table[:, table.shape[1] // 2 : -1].sum() > 0
    }
