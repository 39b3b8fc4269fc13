"""Runs every case of `test_distributed` with one strategy, in one process or two; as a script, what the test starts.

All ranks write what they saw into a file of their own, then leave the process group together.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.autograd.profiler import profile

from moe_peft.agreement import leave_together
from moe_peft.backbones import Backbone, CausalLM, Classifier, Seq2SeqLM
from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.callbacks.guards import Guards
from moe_peft.callbacks.resume import ExactResume
from moe_peft.callbacks.semantic_prior import SemanticPriorFit
from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.counting import METHODS as FILES
from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.sampling import EqualRows
from moe_peft.layers.expert_router import LinearRouter
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.sharding import assign, local, whole
from moe_peft.strategies import ShardedStrategy

BACKBONES = {"causal": CausalLM, "seq2seq": Seq2SeqLM, "classifier": Classifier}
TASKS = {"causal": ("tone", "next", "count", "few"), "seq2seq": ("tone", "next", "count", "few")}
CLASSES = ("tone", "mood", "few")
CLIP = 0.05


class Case(NamedTuple):
    """One fit: its method and what is unusual about it."""

    method: str
    kind: str
    checkpointing: bool = False
    accumulation: int = 1
    dtype: str = "float32"
    options: dict[str, Any] = {}
    optimizer: str = "SGD"
    steps: int = 4
    built: bool = False
    """Whether the module is built before the trainer sees it."""

    @property
    def name(self) -> str:
        """As a test calls it."""
        more = [*self.options, self.dtype if self.dtype != "float32" else "", f"{self.steps} steps"]
        more += ["built before"] if self.built else []
        how = "recomputed" if self.checkpointing else "kept"
        return " ".join([self.method, self.kind, how, f"x{self.accumulation}", *filter(None, more)])


METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "LoRA": (LoRA, {"rank": 3}),
    "TRex": (TRex, {"r1": 2, "r2": 3}),
    "MoRE": (MoRE, {"rank": 4, "rank_cost": 0.1}),
    "TTLoRAMoE": (TTLoRAMoE, {"rank": 2}),
}
CASES = [
    Case(method, kind, *how)
    for method, kind, how in itertools.product(METHODS, ("causal", "seq2seq"), ((False, 1), (True, 2)))
]
CASES += [
    Case("LoRA", "causal", False, 2, options={"loss_mean": "token"}),
    Case("MoRE", "causal", True, 2, options={"embedding_dim": 8}),
    Case("TTLoRAMoE", "classifier", False, 1),
    Case("LoRA", "classifier", True, 2),
    Case("TTLoRAMoE", "causal", False, 1, options={"straight_through": True}),
    Case("TTLoRAMoE", "causal", False, 1, steps=20),
    Case("LoRA", "causal", False, 1, built=True),
    Case("TRex", "causal", True, 1, dtype="bfloat16"),
]
ROOT = Path(__file__).parents[1]
RACK = {file.stem: yaml.safe_load(file.read_text())["model"] for file in (ROOT / "configs/methods").glob("*.yaml")}
KNOWN = {own.__name__ for own, _ in METHODS.values()}
for stem, section in sorted(RACK.items()):
    if section["class_path"] not in KNOWN:  # which have harder cases above
        own = next(vars(file)[section["class_path"]] for file in FILES if section["class_path"] in vars(file))
        METHODS[stem] = own, {name: value for name, value in section["init_args"].items() if name != "optimizer"}
        CASES.append(Case(stem, own.kinds[0]))
BREAKS = [
    Case("TRex", "causal", optimizer="AdamW"),
    Case("MoRE", "causal", options={"embedding_dim": 8}, optimizer="AdamW"),
    Case("TTLoRAMoE", "classifier", optimizer="AdamW"),
]
SAVED_AT = (1, 3)
"""Of four steps, in TT-LoRA MoE's first and second stage."""


class Alive(pl.Callback):
    """Gives every trainable tensor seeded random values: a zero adapter equals anything."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                size = 0.01 if name.endswith(("omega", "magnitude")) else 0.2 if ".cores." in name else 0.1
                assign(parameter, torch.randn(parameter.shape, generator=generator) * size)


class Watch(pl.Callback):
    """Keeps every step's gradients before they are clipped, every micro-batch's loss, and all metrics."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []
        self.metrics: dict[str, float] = {}
        self.tokens: list[int] = []
        self.moved = 0.0
        """By how much the adapters change a row's loss, in one process."""
        self.drawn = False
        """Whether training draws random numbers, which are others on every rank."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        if "labels" in batch:
            self.tokens.append(int((batch["labels"] >= 0).sum()))
        if trainer.world_size == 1 and trainer.global_step == 0:
            with torch.no_grad(), isolate_rng():
                adapted = pl_module(batch)
                self.drawn = not torch.equal(adapted, pl_module(batch))
                with pl_module.context.disabled():
                    self.moved = (adapted - pl_module(batch)).abs().max().item()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        own = [(name, parameter.grad) for name, parameter in pl_module.named_parameters()]
        self.gradients.append({name: whole(grad).clone() for name, grad in own if grad is not None})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].clone())

    def _keep(self, trainer: pl.Trainer, split: str) -> None:
        found = trainer.callback_metrics.items()
        self.metrics |= {name: value.item() for name, value in found if name.startswith(split)}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(trainer, "test")


def callbacks_of(case: Case) -> list[pl.Callback]:
    own: dict[str, list[pl.Callback]] = {
        "TRex": [SemanticPriorFit(n_init=1)],
        "MoRE": [TaskContrast()],
        "TTLoRAMoE": [FreezeThenRoute(experts_steps=case.steps // 2)],
    }
    return own.get(case.method, [])


class SaveAt(pl.Callback):
    """Saves a checkpoint after some optimizer steps."""

    def __init__(self, files: dict[int, Path]) -> None:
        self.files = files

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.files:
            trainer.save_checkpoint(self.files[trainer.global_step])


def build(case: Case, root: Path) -> tuple[Any, MultitaskDataModule]:
    """Makes a case's module and data."""
    pl.seed_everything(5)
    method, options = METHODS[case.method]
    if case.method == "TTLoRAMoE":
        options = options | {"router": LinearRouter(noise=False)}
    source = root / "models" / case.kind
    backbone: Backbone = BACKBONES[case.kind](str(source), dtype=case.dtype, gradient_checkpointing=case.checkpointing)
    tasks = [str(root / "tasks" / name) for name in TASKS.get(case.kind, CLASSES)]
    sampling = EqualRows() if case.method == "TTLoRAMoE" else None
    data = MultitaskDataModule(
        tasks,
        backbone,
        batch_size=24,
        eval_batch_size=8,
        max_length=32,
        sampling=sampling,
        steps_per_epoch=case.steps // 2,
    )
    optimizers: dict[str, Any] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    }
    module = method(
        backbone=backbone,
        tasks=data.specs,
        optimizer=optimizers[case.optimizer],
        max_new_tokens=4,
        **options | case.options,
    )
    return module, data


def trainer_of(case: Case, root: Path, strategy: Any, *more: pl.Callback) -> pl.Trainer:
    """Makes a trainer for one process, or for two with a strategy."""
    processes = int(os.environ.get("WORLD_SIZE", 1 if strategy == "auto" else 2))
    return pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=ShardedStrategy() if strategy == "fsdp" else strategy,
        use_distributed_sampler=False,
        max_epochs=2,
        accumulate_grad_batches=case.accumulation,
        gradient_clip_val=CLIP,
        callbacks=[*callbacks_of(case), *more, Guards(), ExactResume()],
        logger=False,
        num_sanity_val_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root / "runs" / f"{case.name}-{processes}",
    )


def run(case: Case, root: Path, strategy: str) -> dict[str, Any]:
    """Fits and tests one case."""
    module, data = build(case, root)
    if case.built:
        module.built()
    watch = Watch()
    trainer = trainer_of(case, root, strategy, Alive(), watch)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    seen = {name: getattr(watch, name) for name in ("losses", "gradients", "metrics", "tokens", "moved", "drawn")}
    return seen | {"state": whole_state(module), "shards": shards(module)}


def overheard(case: Case, root: Path, strategy: str) -> dict[str, Any]:
    """Runs a case as `run` does, and notes which collectives it calls."""
    operations = profile()
    with operations:
        found = run(case, root, strategy)
    names = {event.name for event in operations.function_events or ()}
    return found | {"collectives": sorted(name for name in names if name.startswith("c10d::"))}


def resume(case: Case, root: Path, strategy: str, file: Path) -> dict[str, Any]:
    """Goes on from a checkpoint."""
    module, data = build(case, root)
    watch = Watch()
    trainer_of(case, root, strategy, watch).fit(module, datamodule=data, ckpt_path=file)
    return {"losses": watch.losses, "state": whole_state(module)}


def break_off(case: Case, root: Path, strategy: str) -> dict[str, Any]:
    """Fits without a break, then from each of its checkpoints; alone, from those of two sharded processes too."""
    files = {step: root / f"{strategy}-{case.name}-{step}.ckpt" for step in SAVED_AT}
    module, data = build(case, root)
    watch = Watch()
    trainer_of(case, root, strategy, Alive(), watch, SaveAt(files)).fit(module, datamodule=data)
    found: dict[str, Any] = {"whole": {"losses": watch.losses, "state": whole_state(module)}}
    found |= {f"from {step}": resume(case, root, strategy, file) for step, file in files.items()}
    if strategy == "auto":
        cut = {step: root / f"fsdp-{case.name}-{step}.ckpt" for step in SAVED_AT}
        found |= {f"from cut {step}": resume(case, root, strategy, file) for step, file in cut.items()}
    return found


def whole_state(module: Any) -> dict[str, Tensor]:
    return {name: whole(value).clone() for name, value in module.adapter_state().items()}


def shards(module: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    """The shape of every parameter, and of what this rank holds of it."""
    return {name: (list(own.shape), list(local(own).shape)) for name, own in module.named_parameters()}


def main(strategy: str, root: str, wanted: str = "") -> None:
    """Runs the cases whose names hold what is wanted."""
    cases = [(case, overheard if case.built else run) for case in CASES if wanted in case.name]
    found: dict[str, Any] = {case.name: how(case, Path(root), strategy) for case, how in cases}
    found |= {f"break off {case.name}": break_off(case, Path(root), strategy) for case in BREAKS if wanted in case.name}
    rank = 0 if strategy == "auto" else torch.distributed.get_rank()
    world = os.environ.get("WORLD_SIZE", "1" if strategy == "auto" else "2")
    torch.save(found, Path(root) / f"{strategy}-{world}-{rank}.pt")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
