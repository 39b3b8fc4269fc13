"""The LightningCLI: class paths for methods, data and callbacks, one run folder, and errors of one line."""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from moe_peft import counting, strategies
from moe_peft.agreement import leave_together
from moe_peft.callbacks import (
    ablation,
    checkpoints,
    confusion,
    freeze_then_route,
    null_expert,
    predictions,
    rank_report,
    results,
    routing_report,
    semantic_prior,
    shared_start,
    start,
    task_contrast,
    transfer,
)
from moe_peft.callbacks.guards import Guards
from moe_peft.callbacks.preemption import Preemption
from moe_peft.callbacks.progress import with_progress
from moe_peft.callbacks.resume import ExactResume
from moe_peft.callbacks.run_config import RunConfig, remove_if_empty
from moe_peft.callbacks.summary import Summary
from moe_peft.callbacks.task_losses import TaskLosses
from moe_peft.checkpoint import LOCATION, TRAINING, conflicts, plain_model_config, read_checkpoint
from moe_peft.command_line import quiet
from moe_peft.data import module as data_module
from moe_peft.loggers import MetricsCSV
from moe_peft.messages import one_line
from moe_peft.methods.base import MultitaskModule
from moe_peft.parsing import ConfigParser
from moe_peft.resumption import checkpoint_files, read_first_whole
from moe_peft.trainer_checks import refuse_unsupported

# Imported so that their classes are known to the configuration by bare name.
CALLBACKS = (
    ablation,
    confusion,
    freeze_then_route,
    null_expert,
    rank_report,
    routing_report,
    semantic_prior,
    shared_start,
    start,
    task_contrast,
    transfer,
)
NAMED = (*counting.NAMED, *CALLBACKS, strategies)
TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,
    "default_root_dir": "runs/default",
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
"""Where they differ from Lightning's own."""


class Parser(ConfigParser, LightningArgumentParser):
    """Reports a configuration error in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what names the fault and exits with status 2; parsers that only try a type raise as usual."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)


class CLI(LightningCLI):
    """LightningCLI in subclass mode, with this package's run folder, checkpoint rules and results."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the given arguments (they may equal this process's own, which Lightning would warn about)."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the fixed callbacks and the two links between model and data."""
        parser.add_lightning_class_args(checkpoints.AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(results.Results, "results")
        parser.add_lightning_class_args(predictions.PredictionFile, "predictions")
        parser.link_arguments("model.init_args.backbone", "data.init_args.backbone")
        parser.link_arguments("data.specs", "model.init_args.tasks", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Checks a given checkpoint before any work, and that no model argument contradicts it.

        Lightning's own version lays the checkpoint's arguments over what the user typed, without a word.
        """
        config, fit = self.config.get(self.config.subcommand, {}), self.config.subcommand == "fit"
        path, folder = config.get("ckpt_path"), Path(config.trainer.default_root_dir)
        if not path and not fit:
            raise ValueError(
                f"ckpt_path: {self.config.subcommand} needs a checkpoint; add --ckpt_path <run>/checkpoints/best.ckpt"
            )
        files = checkpoint_files(path, folder)
        if not files or path == "registry":
            return
        file, content = read_first_whole(files) if fit else (files[0], read_checkpoint(files[0]))
        config.ckpt_path = str(file)
        if fit and "optimizer_states" not in content:
            raise ValueError(
                f"ckpt_path: {str(file)!r} holds a model only, no training to go on with; test it, or grow it further"
            )
        there, here = content["moe_peft"]["config"], plain_model_config(config)
        free = LOCATION if fit else LOCATION + TRAINING
        found = [] if there is None else conflicts(there, here, free)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            name = found[0].replace("init_args.", "")
            raise ValueError(f"model.{name}{more}: use the checkpoint's value, or its run's config.yaml")

    def before_instantiate_classes(self) -> None:
        """Refuses what cannot go well."""
        config = self.config[self.config.subcommand]
        refuse_unsupported(config.trainer)
        if self.config.subcommand == "test":
            config.verbose = False  # Results prints the table
        if self.config.subcommand == "fit" and not config.trainer.fast_dev_run and not config.ckpt_path:
            refuse_existing_run(Path(config.trainer.default_root_dir))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives a fit without loggers of its own metrics.csv and TensorBoard files; other commands need none.

        They are not put into the configuration, which may be used again for another run folder.
        """
        trainer = self.config[self.config.subcommand].trainer
        if trainer.logger in (None, True):
            folder = str(trainer.default_root_dir)
            board = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
            kwargs["logger"] = [MetricsCSV(folder), board] if self.config.subcommand == "fit" else False
        callbacks = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks
        if not any(isinstance(callback, routing_report.RoutingReport) for callback in callbacks):
            callbacks = [*callbacks, routing_report.RoutingReport()]
        kwargs["callbacks"], kwargs["enable_progress_bar"] = with_progress(callbacks, trainer.enable_progress_bar)
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Instantiates everything and hands the module its own configuration, for the checkpoint."""
        super().instantiate_classes()
        self.model.config = plain_model_config(self.config[self.config.subcommand])

    def before_fit(self) -> None:
        """Checks the run folder, the rows of all splits and the batch size before anything is loaded or written."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, results.Results):
                callback.setup(self.trainer, self.model, "fit")
        self.datamodule.trainer = self.trainer
        try:
            for stage in ("test", "fit"):
                self.datamodule.setup(stage)
        except BaseException:
            remove_if_empty(Path(self.trainer.default_root_dir))
            raise

    def after_fit(self) -> None:
        """Evaluates the best checkpoint (or the last weights) on the test split."""
        if self.trainer.fast_dev_run or self.trainer.interrupted:  # type: ignore[attr-defined]
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)


def refuse_existing_run(folder: Path) -> None:
    """Refuses a folder that holds a run."""
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"trainer.default_root_dir: '{folder}' already holds a run; name another folder, "
            "or resume it with --ckpt_path last"
        )


def run(arguments: list[str]) -> CLI:
    """Parses `arguments` and runs the command; a user's mistake ends in one line and status 2."""
    quiet()
    alone = not (distributed.is_available() and distributed.is_initialized())
    try:
        cli = CLI(
            MultitaskModule,
            data_module.MultitaskDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            parser_class=Parser,
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [Guards(), ExactResume(), TaskLosses(), Preemption(), Summary()],
                **TRAINER_DEFAULTS,
            },
            args=arguments,
        )
        if alone:  # before: a process group that was made here
            leave_together()
        return cli
    except SIGTERMException:
        leave_together()
        # Shells and schedulers know this status; but Lightning's launcher kills rank zero when another process fails.
        sys.exit(128 + signal.SIGTERM if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("MOE_PEFT_TRACEBACK"):
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
