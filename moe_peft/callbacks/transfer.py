"""Transfer: a fit that begins with the adapters of another run, on tasks that run may not have known.

Everything but the task rows is taken over as it is, the scaling of the experts included. Tasks that both runs list keep
their rows and heads, matched by name; a new task's row comes from the known ones, a new head starts fresh. What comes
out is an ordinary run, whose checkpoints need nothing of this.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.checkpoint import (
    LOCATION,
    TRAINING,
    check_adapter_names,
    conflicts,
    describe,
    read_checkpoint,
    refuse_foreign,
)
from moe_peft.layers.rank_selector import rank_selectors
from moe_peft.layers.representation import Representation
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.nearest_task import nearest_task
from moe_peft.methods.task_rows import NEW, sources, task_tables, with_heads, with_rows
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.runs import find_checkpoint

logger = logging.getLogger(__name__)

FREE = (*LOCATION, *TRAINING, "init_args.dropout", "init_args.rank_cost")
"""Model arguments that may differ from the checkpoint's: its tensors mean the same all the same."""
PROMPTS_PER_TASK = 100


class TransferFrom(Callback):
    """Starts a fit from a trained checkpoint, whatever tasks it was trained on; a resumed fit goes on instead.

    Args:
        checkpoint: a checkpoint, or a run's folder (its best checkpoint).
        new_row: a new task's embedding: the "mean" of all the checkpoint's rows, or the row of the known task that
            most of its training prompts are nearest to.
        train: "all"; "selector" freezes the factors A and B, so that only task embeddings, gates and heads learn;
            "row" freezes the gates too.
    """

    def __init__(
        self,
        checkpoint: str,
        new_row: Literal["mean", "nearest"] = "mean",
        train: Literal["all", "selector", "row"] = "all",
    ) -> None:
        self.checkpoint, self.new_row, self.train = checkpoint, new_row, train

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freezes what shall not learn, before optimizers and data-parallel wrappers are made.

        Raises:
            ValueError: a method without rank selectors that learn, where only they shall.
        """
        if self.train != "all":  # in a test too, which counts what was trained
            assert isinstance(pl_module, MultitaskModule)
            pl_module.configure_model()
            self._freeze(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over, unless a checkpoint of this run itself was restored (which no earlier hook can tell).

        Raises:
            ValueError: no such checkpoint, one of another method, base, shape or scaling, other classes of a known
                task, or a method without task embeddings where they are asked for.
        """
        if trainer.ckpt_path is None:
            assert isinstance(pl_module, MultitaskModule)
            self._take_over(trainer, pl_module)

    def _freeze(self, module: MultitaskModule) -> None:
        """Keeps the factors, and the gates where asked, from learning: no gradient, no weight decay."""
        selectors = list(rank_selectors(module.adapted).values())
        if not selectors or any(selector.weight is None for selector in selectors):
            raise ValueError(
                f"TransferFrom: train {self.train!r} needs rank selectors that learn, which {type(module).__name__} "
                "does not have as configured; set train: all"
            )
        for layer in module.adapted.values():
            layer.factors.requires_grad_(False)
        for selector in selectors if self.train == "row" else ():
            for gate in (selector.weight, selector.bias):
                assert gate is not None
                gate.requires_grad_(False)

    def _take_over(self, trainer: Trainer, module: MultitaskModule) -> None:
        if isinstance(module, TTLoRAMoE):
            raise ValueError(
                "TransferFrom: a TTLoRAMoE's experts belong to their tasks; collect exported ones with FreezeThenRoute "
                "expert_paths, or add one with tools/add_expert.py"
            )
        path = find_checkpoint(Path(self.checkpoint).expanduser())
        content = read_checkpoint(path, "TransferFrom: checkpoint")
        about, state = content["moe_peft"], content["state_dict"]
        refuse_foreign(content, describe(module), tasks=False)
        refuse_other_meaning(about["config"], module.config)
        check_adapter_names(module.adapter_state(), state)
        there: list[str] = about["tasks"]
        names = [spec.name for spec in module.specs]
        rows = sources(there, names)
        how: Representation | None = about.get("representation")
        module.representation = module.representation or how  # this run's own TaskContrast may have set it already
        tables = task_tables(module, state)
        if self.new_row == "nearest" and NEW in rows:
            if not tables:
                raise ValueError(
                    f"TransferFrom: {type(module).__name__} has no task embeddings; leave new_row at its default"
                )
            rows = trainer.strategy.broadcast(self._nearest_rows(trainer, module, tables, how or "mean", there, rows))
        module.load_state_dict(with_heads(module, with_rows(module, state, rows), about))
        if trainer.is_global_zero:
            known = [name for name in names if name in there]
            logger.info("transfer: adapters of %s; tasks taken over: %s", path, ", ".join(known) or "none")
            for name, row in zip(names, rows, strict=True):
                if name not in there and tables:
                    origin = f"the mean of {len(there)} rows" if row == NEW else f"the row of {there[row]}"
                    logger.info("transfer: new task %s starts with %s", name, origin)

    def _nearest_rows(
        self,
        trainer: Trainer,
        module: MultitaskModule,
        tables: dict[str, Tensor],
        how: Representation,
        there: list[str],
        rows: list[int],
    ) -> list[int]:
        """Returns the rows with the most voted known task in every new task's place; the first one of equals."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "sample_prompts"):
            raise ValueError("TransferFrom: new_row nearest needs a MultitaskDataModule, or use mean")
        new = torch.tensor([task for task, row in enumerate(rows) if row == NEW])
        votes: dict[int, Counter[int]] = {int(task): Counter() for task in new}
        for batch in datamodule.sample_prompts(PROMPTS_PER_TASK * len(rows), 0):
            wanted = torch.isin(batch["task_id"], new)
            if not wanted.any():
                continue
            ids, mask = (batch[name][wanted].to(module.device) for name in ("input_ids", "prompt_mask"))
            asked = Batch(input_ids=ids, prompt_mask=mask)
            nearest = nearest_task(module, asked, tables, how)
            for task, row in zip(batch["task_id"][wanted].tolist(), nearest.tolist(), strict=True):
                votes[task][row] += 1
        for task, counts in votes.items():
            if trainer.is_global_zero:
                shares = ", ".join(f"{there[row]} {count}" for row, count in counts.most_common())
                logger.info("transfer: prompts of %s are nearest to: %s", module.specs[task].name, shares)
        found = {task: min(counts, key=lambda row: (-counts[row], row)) for task, counts in votes.items()}
        return [found.get(task, row) for task, row in enumerate(rows)]


def refuse_other_meaning(there: dict[str, Any] | None, here: dict[str, Any] | None) -> None:
    """Raises one line if the checkpoint's tensors meant something else than they would here."""
    if there is None or here is None:
        return
    found = conflicts(there, here, FREE)
    if found:
        raise ValueError(f"TransferFrom: model.{found[0].replace('init_args.', '')}; use the checkpoint's value")
