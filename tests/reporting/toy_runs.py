"""Run folders as a fit leaves them, made up: every file that a report reads, with numbers drawn from a seed."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TASKS = ("sst2", "arc_easy", "csqa")
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
EXPERTS = {
    "TRex": [f"{i},{j}" for i in range(3) for j in range(2)],
    "MoRE": ["r1", "r2", "r3", "r4"],
}
STEPS = (10, 20, 30)


def layers_of(blocks: int = 4, kinds: Sequence[str] = KINDS) -> list[str]:
    """Names of linears as Llama's."""
    return [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in kinds]


class ToyRun:
    """A run folder; `write()` makes all of it, single files can be left out or written over afterwards.

    Args:
        folder: the run folder.
        method: TRex, MoRE, TTLoRAMoE or LoRA.
        tasks: names, which may be anything.
        seed: of the numbers, and the run's own.
        model: arguments of the method.
        layers: names of the linears.
        base: the backbone's name.
    """

    def __init__(
        self,
        folder: Path,
        method: str = "TRex",
        tasks: Sequence[str] = TASKS,
        seed: int = 0,
        model: dict[str, Any] | None = None,
        layers: Sequence[str] = (),
        base: str = "models/tiny",
    ) -> None:
        self.folder, self.method, self.tasks, self.seed = folder, method, list(tasks), seed
        self.model, self.base, self.random = model or {}, base, np.random.default_rng(seed)
        self.layers = list(layers or layers_of()) if method != "TTLoRAMoE" else ["all"]
        self.experts = EXPERTS.get(method, [*tasks, "none"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "routing").mkdir(exist_ok=True)

    def write(self) -> "ToyRun":
        """Writes every file that a finished run of the method has."""
        self.config()
        self.results()
        self.metrics()
        if self.method == "LoRA":
            return self
        self.use()
        self.summary()
        self.findings([])
        self.embedding()
        if self.method == "TRex":
            self.gates()
            self.clusters()
        if self.method == "MoRE":
            self.ranks()
        if self.method == "TTLoRAMoE":
            self.confusion()
            self.confidence()
        return self

    def table(self, name: str, header: str, rows: Sequence[Sequence[Any]]) -> None:
        """Writes a CSV file below the run folder."""
        with (self.folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header.split(","), *rows])

    def config(self) -> None:
        """Writes config.yaml."""
        backbone = {"class_path": "moe_peft.backbones.CausalLM", "init_args": {"name": self.base}}
        config = {
            "seed_everything": self.seed,
            "trainer": {"default_root_dir": str(self.folder), "max_epochs": 1},
            "model": {
                "class_path": f"moe_peft.methods.{self.method}",
                "init_args": {"backbone": backbone, **self.model},
            },
            "data": {"class_path": "MultitaskDataModule", "init_args": {"batch_size": 8, "seed": None}},
        }
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def results(self, name: str = "results.json", rows: int = 250) -> None:
        """Writes a results file."""
        levels = {"base": 0.5, "majority": 0.3, "model": 0.6}
        table = {}
        for row, level in levels.items():
            values = {task: float(level + 0.2 * self.random.random()) for task in self.tasks}
            table[row] = {
                "mean": float(np.mean(list(values.values()))),
                "stderr": 0.013,
                "tasks": {
                    task: {"metric": "accuracy", "value": value, "stderr": 0.03, "n": rows}
                    for task, value in values.items()
                },
            }
        content = {
            "method": self.method,
            "backbone": {"class": "CausalLM", "name": self.base, "dtype": "bfloat16"},
            "seed": self.seed,
            "trainable_parameters": 3_617_700,
            "wall_seconds": 174.0 + self.seed,
            "checkpoint": str(self.folder / "checkpoints" / "best.ckpt"),
            "versions": {"moe_peft": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"},
            "ranking": "sum",
            "routes": self.method != "LoRA",
            "notes": dict.fromkeys(self.tasks, "cut from dev"),
            "rows": table,
            "paired": {
                "model-base": {"difference": 0.077, "stderr": 0.0125},
                "model-majority": {"difference": -0.012, "stderr": 0.02},
            },
        }
        (self.folder / name).write_text(json.dumps(content), encoding="utf-8")

    def metrics(self) -> None:
        """Writes metrics.csv: the loss every second step, every task's accuracy at each validation."""
        last = STEPS[-1]
        rows: list[tuple] = [
            (step, 0, "train/loss", 0.9 + 2 * np.exp(-3 * step / last) + 0.1 * self.random.random())
            for step in range(2, last + 1, 2)
        ]
        rows += [
            (step, 0, f"train/{task}/loss", 0.8 + 2 * np.exp(-3 * step / last))
            for task in self.tasks
            for step in range(2, last + 1, 2)
        ]
        for step in STEPS:
            values = [0.4 + 0.3 * step / last + 0.05 * self.random.random() for _ in self.tasks]
            rows += [(step, 0, f"val/{task}/accuracy", value) for task, value in zip(self.tasks, values, strict=True)]
            rows += [(step, 0, "val/mean", float(np.mean(values))), (step, 0, "val/router/accuracy", 0.9)]
        self.table("metrics.csv", "step,epoch,name,value", rows)

    def use(self) -> None:
        """Writes use.csv: a validation at every step, the test at the last."""
        rows = []
        for step, split in [*((step, "validation") for step in STEPS), (STEPS[-1], "test")]:
            for t, task in enumerate(self.tasks):
                for layer in self.layers:
                    share = self.shares(t, step)
                    chosen = share == share.max()
                    for expert, own, first in zip(self.experts, share, chosen, strict=True):
                        rows.append((step, split, task, layer, expert, own, int(first), 100))
        self.table("routing/use.csv", "step,split,task,layer,expert,weight,chosen,tokens", rows)

    def shares(self, task: int, step: int) -> np.ndarray:
        """[E] shares that sum to one: ranks are chosen outright, others lean towards an expert of the task's own."""
        count = len(self.experts)
        if self.method == "MoRE":
            return np.eye(count)[min(count - 1, max(0, int(self.random.normal(1 + task, 0.8))))]
        sharp = 6.0 if self.method == "TTLoRAMoE" else 2.5 * step / STEPS[-1]
        logits = self.random.normal(0, 0.5, count)
        logits[task % count] += sharp
        exponent = np.exp(logits)
        return exponent / exponent.sum()

    def summary(self) -> None:
        """Writes summary.csv."""
        rows = []
        for step, split in [
            *((step, split) for step in STEPS for split in ("train", "validation")),
            (STEPS[-1], "test"),
        ]:
            entropy = 1 - 0.3 * step / STEPS[-1] * self.random.random(len(self.layers))
            mutual = 0.5 * step / STEPS[-1] * self.random.random(len(self.layers))
            dead = (self.random.random(len(self.layers)) < 0.1).astype(int)
            if self.layers != ["all"]:
                rows += [
                    (step, split, layer, *values, 0)
                    for layer, *values in zip(self.layers, entropy, mutual, dead, strict=True)
                ]
            rows.append((step, split, "all", entropy.mean(), mutual.mean(), dead.sum(), 0))
        self.table("routing/summary.csv", "step,split,layer,entropy,mutual_information,dead,collapsed", rows)

    def findings(self, found: Sequence[dict[str, Any]]) -> None:
        """Writes findings.json."""
        (self.folder / "routing" / "findings.json").write_text(json.dumps(list(found)), encoding="utf-8")

    def gates(self) -> None:
        """Writes gates.csv."""
        rows = [
            (step, layer, 0.5 + 0.3 * step / STEPS[-1] * (self.random.random() - 0.5), 0.5 + 0.1 * self.random.random())
            for step in STEPS
            for layer in self.layers
        ]
        self.table("routing/gates.csv", "step,layer,omega,magnitude", rows)

    def clusters(self, count: int = 6) -> None:
        """Writes clusters.csv."""
        rows = []
        for t, task in enumerate(self.tasks):
            share = self.random.dirichlet(np.where(np.arange(count) % len(self.tasks) == t, 3.0, 0.2))
            counts = np.round(250 * share).astype(int)
            rows += [("test", task, cluster, own, own / counts.sum()) for cluster, own in enumerate(counts)]
        self.table("routing/clusters.csv", "split,task,cluster,rows,share", rows)

    def ranks(self, top: int = 4) -> None:
        """Writes ranks.csv."""
        chosen = np.clip(
            self.random.normal(1.5 + np.arange(len(self.tasks))[:, None], 1, (len(self.tasks), len(self.layers))),
            1,
            top,
        )
        rows = [
            (task, layer, 2, int(chosen[t, at]))
            for t, task in enumerate(self.tasks)
            for at, layer in enumerate(self.layers)
        ]
        self.table("routing/ranks.csv", "task,linear,start,rank", rows)

    def confusion(self) -> None:
        """Writes confusion.csv."""
        counts = 10 * self.random.integers(0, 2, (len(self.tasks), len(self.experts)))
        counts[np.arange(len(self.tasks)), np.arange(len(self.tasks))] = 200
        with (self.folder / "routing" / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(["task", *self.experts])
            csv.writer(file).writerows([task, *own] for task, own in zip(self.tasks, counts.tolist(), strict=True))

    def confidence(self) -> None:
        """Writes confidence.csv: ten bins."""
        rows = []
        for task in self.tasks:
            count = (60 * np.linspace(0, 1, 10) ** 2 * self.random.random(10)).astype(int) + 1
            right = (count * np.linspace(0.3, 1, 10)).astype(int)
            rows += [("test", task, at / 10, (at + 1) / 10, count[at], right[at]) for at in range(10)]
        self.table("routing/confidence.csv", "split,task,low,high,rows,right", rows)

    def embedding(self) -> None:
        """Writes embedding.csv."""
        names = [(task, "task") for task in self.tasks]
        names += [(str(cluster), "cluster") for cluster in range(6)] if self.method == "TRex" else []
        rows = [(name, kind, *self.random.normal(0, 1, 2)) for name, kind in names]
        self.table("routing/embedding.csv", "name,kind,x,y", rows)
