"""The LightningCLI: class paths for methods, data and callbacks, one run folder, and errors of one line."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from moe_peft import backbones, embedders
from moe_peft.callbacks import checkpoints, predictions, results, semantic_prior
from moe_peft.checkpoint import conflicts, read_checkpoint
from moe_peft.data import module as data_module
from moe_peft.methods import lora, trex
from moe_peft.methods.base import MultitaskModule

# Imported so that their classes are known to the configuration by bare name.
NAMED = (backbones, embedders, semantic_prior, lora, trex)
# Where a model's files lie may differ from machine to machine; the fingerprint decides whether it is the same model.
LOCATION = ("backbone",)


class Parser(LightningArgumentParser):
    """Reports a configuration error in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what names the fault and exits with status 2; parsers that only try a type raise as usual."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)


def one_line(message: str) -> str:
    """Condenses jsonargparse's nested report: what was wrong, without the list of other types it tried."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if any(
            mark in line for mark in ("is not accepted", "Option ", "not allowed", "No action", "required", "Invalid")
        )
        or ("Problem with given class_path" in line and line is not lines[0])
    ]
    chosen = [lines[0]] + [line for line in telling if line != lines[0]][:2]
    return " | ".join(chosen)[:600]


class RunConfig(SaveConfigCallback):
    """Writes the merged configuration of a fit to <run>/config.yaml; other commands write none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes once, on rank zero, and refuses to overwrite another run's file."""
        if self.already_saved or stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.already_saved = True
        path = Path(trainer.default_root_dir) / "config.yaml"
        resumed = trainer.ckpt_path is not None
        if path.exists() and not resumed:
            raise ValueError(
                f"trainer.default_root_dir: {path.parent} already holds a run; name another folder, "
                "or resume it with --ckpt_path"
            )
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, path, skip_none=False, overwrite=resumed, multifile=False)


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
        path = self.config.get(self.config.subcommand, {}).get("ckpt_path")
        if not path or path in ("best", "last", "hpc", "registry"):
            return
        there = read_checkpoint(path)["moe_peft"]["config"]
        here = plain_model_config(self.config[self.config.subcommand])
        found = [] if there is None else [c for c in conflicts(there, here) if LOCATION[0] not in c.split(" is ")[0]]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ValueError(f"--model.{found[0]}{more}: use the checkpoint's value, or its run's config.yaml")

    def before_instantiate_classes(self) -> None:
        """Gives a run without loggers of its own metrics.csv and TensorBoard files in the run folder."""
        trainer = self.config[self.config.subcommand].trainer
        if trainer.logger in (None, True) and self.config.subcommand == "fit":
            folder = str(trainer.default_root_dir)
            board = {"save_dir": folder, "name": "", "version": "tensorboard", "default_hp_metric": False}
            trainer.logger = [
                Namespace(class_path="moe_peft.loggers.MetricsCSV", init_args=Namespace(save_dir=folder)),
                Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=Namespace(**board)),
            ]
        elif trainer.logger is None:
            trainer.logger = False

    def instantiate_classes(self) -> None:
        """Instantiates everything and hands the module its own configuration, for the checkpoint."""
        super().instantiate_classes()
        self.model.config = plain_model_config(self.config[self.config.subcommand])

    def after_fit(self) -> None:
        """Evaluates the best checkpoint (or the last weights) on the test split."""
        if self.trainer.fast_dev_run or self.trainer.interrupted:  # type: ignore[attr-defined]
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)


def plain_model_config(config: Any) -> dict[str, Any]:
    """Returns the model section as plain types (what a checkpoint stores and compares)."""
    model = config["model"].as_dict() if hasattr(config["model"], "as_dict") else dict(config["model"])
    model.get("init_args", {}).pop("tasks", None)
    return model


def quiet() -> None:
    """Silences messages that no user of this package can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def run(arguments: list[str]) -> CLI:
    """Parses `arguments` and runs the command; a user's mistake ends in one line and status 2."""
    quiet()
    try:
        return CLI(
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
                "use_distributed_sampler": False,
                "default_root_dir": "runs/default",
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "enable_progress_bar": sys.stdout.isatty(),
            },
            args=arguments,
        )
    except (ValueError, OSError) as error:
        if os.environ.get("MOE_PEFT_TRACEBACK"):
            raise
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
