"""Faults to plant into a routing, the routing of rows counted once more in plain Python, and what a run's files say."""

import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from moe_peft.data.preview import load_data_module
from moe_peft.runs import load_module

DEAD = "model.layers.0.self_attn.q_proj"
COLLAPSED = "model.layers.1.mlp.up_proj"


class Plant(Callback):
    """Leaves pair 1,1 of one linear without any weight, and gives pair 0,2 of another one all of it."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for slot, zeroed in ((DEAD, [4]), (COLLAPSED, [0, 1, 3, 4, 5])):
            router = pl_module.adapted[slot].router
            with torch.no_grad():
                router.omega.fill_(-1.0)  # the prior's part alone decides
                router.projection[zeroed] = 0.0


def reporting(config: dict[str, Any], **arguments: int) -> dict[str, Any]:
    """Adds a RoutingReport to a configuration."""
    config["trainer"]["callbacks"].append({"class_path": "RoutingReport", "init_args": arguments})
    return config


def table(file: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def recount(run: Path, split: str) -> tuple[dict[tuple[str, str, str], tuple[float, float, int]], dict[str, float]]:
    """Counts the raw routing of all rows of a split, one row at a time, so that there is no padding.

    Returns:
        (weight, chosen, tokens) by task, layer and expert's number; the mean entropy by layer.
    """
    data, module = load_data_module([f"--config={run}/config.yaml"]), load_module(run)
    weights, chosen = defaultdict(float), defaultdict(int)
    tokens, entropies = defaultdict(int), defaultdict(list)
    module.context.recording = True
    for row in data.rows(split):
        task = data.specs[row.task_id].name
        with torch.no_grad():
            module(data.collator.train([row], 1.0, 1.0))
        for layer, routing in module.context.records.items():
            for values in routing.weights[0].tolist():
                sizes = [abs(value) for value in values]
                shares = [size / sum(sizes) for size in sizes]
                tokens[task, layer] += 1
                for expert, share in enumerate(shares):
                    weights[task, layer, str(expert)] += share
                    chosen[task, layer, str(expert)] += shares.index(max(shares)) == expert
                entropies[layer].append(-sum(p * math.log(p) for p in shares if p) / math.log(len(shares)))
    found = {
        key: (weight / tokens[key[:2]], chosen[key] / tokens[key[:2]], tokens[key[:2]])
        for key, weight in weights.items()
    }
    return found, {layer: sum(own) / len(own) for layer, own in entropies.items()}


def information(uses: dict[tuple[str, str, str], tuple[float, float, int]], layer: str) -> float:
    """The mutual information of two tasks and a layer's experts in bits, out of `recount`."""
    tasks = sorted({task for task, _, _ in uses})
    experts = [expert for task, own, expert in uses if own == layer and task == tasks[0]]
    assert len(tasks) == 2 and len(experts) == 6
    bits = 0.0
    for expert in experts:
        own = [uses[task, layer, expert][0] for task in tasks]
        bits += sum(p * math.log2(2 * p / sum(own)) for p in own if p) / 2
    return bits
