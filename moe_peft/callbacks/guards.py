"""What goes wrong without a word otherwise: ranks that differ, and parameters that nothing trains."""

import os

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from moe_peft.agreement import agree, from_all_ranks
from moe_peft.checkpoint import describe
from moe_peft.data.module import MultitaskDataModule
from moe_peft.methods.base import MultitaskModule
from moe_peft.optim import parameter_groups, trained_parameters
from moe_peft.sharding import local

LOCATED = ("backbone", "embedder", "features")
"""Arguments of a method with paths in them, which have fingerprints."""


class Guards(Callback):
    """Compares the ranks' data and trainable parameters at the start, and checks every stage's first gradients."""

    def __init__(self) -> None:
        self._seen: set[frozenset[str]] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares what the ranks have, before a data-parallel wrapper could hang over it.

        Raises:
            ValueError: the ranks differ; names in what.
        """
        self._seen = set()
        if trainer.world_size == 1:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, MultitaskDataModule):
            agree(data_facts(data, stage))
        assert isinstance(pl_module, MultitaskModule)
        with trainer.strategy.tensor_init_context(), trainer.strategy.model_sharded_context():  # as Lightning would
            pl_module.configure_model()
        agree(module_facts(pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Looks at the gradients of what the present stage trains, once per stage.

        Raises:
            ValueError: a parameter without a gradient, or one that is not finite.
        """
        assert isinstance(pl_module, MultitaskModule)
        stage = pl_module.closed_groups
        if stage in self._seen:
            return
        self._seen.add(stage)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # which skips steps that overflow
        found = [fault for fault in from_all_ranks(first_fault(pl_module, scaled)) if fault]
        if found:
            raise ValueError(f"step {trainer.global_step}: {found[0]}")


def first_fault(module: MultitaskModule, scaled: bool) -> str | None:
    """Says which open parameter has no gradient, or one that is not finite (unless a scaler sees to it)."""
    groups = parameter_groups(module).items()
    open_now = {id(parameter) for name, own in groups if name not in module.closed_groups for parameter in own}
    for name, parameter in trained_parameters(module).items():
        if id(parameter) not in open_now:
            continue
        if parameter.grad is None:
            fix = "; leave its linear out of model.targets" if name.startswith("model.") else ""
            return f"{name} got no gradient, so that nothing would train it: no loss depends on it{fix}"
        if not scaled and not torch.isfinite(local(parameter.grad)).all():
            return (
                f"{name} got a gradient that is not finite; give the backbone a dtype of wider range, or look at the "
                "rows with tools/preview_mix.py"
            )
    return None


def module_facts(module: MultitaskModule) -> dict[str, str]:
    """Returns what a module is: where its files lie may differ from node to node."""
    about = describe(module)
    options = (about["config"] or {}).get("init_args", {})
    facts = {"the method": about["method"], "the frozen base": about["fingerprint"], "the embedder": about["embedder"]}
    plain = {f"model.{name}": str(value) for name, value in options.items() if name not in LOCATED}
    return facts | plain | {name: str(list(own.shape)) for name, own in trained_parameters(module).items()}


def data_facts(data: MultitaskDataModule, stage: str) -> dict[str, str]:
    """Returns what decides the batches of a stage; the test rows also of a fit, which ends in a test."""
    facts = {"the seed": os.environ.get("PL_GLOBAL_SEED", "none")}
    if stage == "predict":
        return facts | {"the rows": data.cache_key(data.predict_split, labelled=False)}
    if stage == "fit":
        facts["the training rows"] = data.cache_key("train")
        facts["the order of the rows"] = str(data.train_dataloader().multitask_sampler.identity(0))
    if stage in ("fit", "validate"):
        facts["the validation rows"] = data.cache_key("validation")
    if stage in ("fit", "test"):
        facts["the test rows"] = data.cache_key("test")
        facts["the rows outside"] = str({name: len(rows) for name, rows in data.outside_rows.items()})
    return facts
