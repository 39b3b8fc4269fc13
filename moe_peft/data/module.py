"""The LightningDataModule: tasks in, tokenised and mixed batches out. It knows no method."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from moe_peft.backbones import Backbone
from moe_peft.batch import Batch
from moe_peft.data import datasets_task, olmo_eval
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow, Encoder
from moe_peft.data.evaluation import EvalBatches, evaluation_loader, group_for_evaluation
from moe_peft.data.loader import MultitaskSampler, ResumableLoader, TrainRows, place_of
from moe_peft.data.prompts import encode_prompts, sample_equally
from moe_peft.data.rows import majority_label
from moe_peft.data.sampling import Proportional, Sampling
from moe_peft.data.sources import TaskFolder, TaskSource
from moe_peft.data.tasks import SPLITS, Split, TaskSpec, refuse_names

# Imported so that their classes are known to the configuration by bare name.
NAMED = (datasets_task, olmo_eval)

_STAGE_SPLITS: dict[str, tuple[Split, ...]] = {"fit": ("train", "validation"), "validate": ("validation",)}


class MultitaskDataModule(LightningDataModule):
    """Several tasks, encoded for one backbone and sampled into multitask batches.

    Args:
        tasks: Sources, or names of task folders; the place in the list is the task's id.
        backbone: Whose tokenizer and kind decide the encoding.
        root: Folder in which the relative paths of task folders are looked up, those in `tasks` and those of sources;
            the current folder where not given.
        batch_size: Rows of one optimizer step, over all ranks and accumulation steps.
        eval_batch_size: At most so many sequences (one per scored option) in an evaluation batch of one rank.
        max_length: Token limit of prompt and answer together. A longer prompt is cut from the left, an answer never.
        sampling: The rule for the tasks of a batch's rows; `Proportional()` where not given.
        steps_per_epoch: Optimizer steps of an epoch; the data decide (one pass) where not given.
        seed: Decides the order of the rows; the run's own seed (`seed_everything`) where not given.
        num_workers: Loader processes; changes no batch.
        style: plain text, or the tokenizer's own chat template.
        bos: Start token before a prompt: auto does what the tokenizer or its chat template does by itself.
        system: System message of the chat template.
        answer_prefix: Text before every answer; " " where not given, and "" for chat and seq2seq.
        number_format: Format of a regression value that is written as text.
        number_steps: Steps per unit that a regression value is rounded to before it is written (5: multiples of 0.2);
            the metric sees the value itself.
        predict_split: The split that `predict` runs on.
        outside: Tasks of any kind that are none of the mixture's, looked up as `tasks` are; a test reads their test
            prompts to measure how well inputs from elsewhere are recognised.

    Raises:
        ValueError: No task, two tasks of one name, or a size below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str | TaskSource],
        backbone: Backbone,
        root: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_length: int = 160,
        sampling: Sampling | None = None,
        steps_per_epoch: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        style: Literal["plain", "chat"] = "plain",
        bos: Literal["auto", "always", "never"] = "auto",
        system: str | None = None,
        answer_prefix: str | None = None,
        number_format: str = ".1f",
        number_steps: int | None = None,
        predict_split: Split = "test",
        outside: Sequence[str | TaskSource] | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks=[] names no task; give at least one task folder or source.")
        for argument, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise ValueError(f"{argument}={value} must be 1 or more.")
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed} must not be negative.")
        folder = Path(root or "").expanduser()
        self.sources = [(TaskFolder(task) if isinstance(task, str) else task).under(folder) for task in tasks]
        # Equal options are no reason to stop where only prompts are read.
        elsewhere = [
            TaskFolder(task, equal_options="drop") if isinstance(task, str) else task for task in outside or ()
        ]
        self.outside = [source.under(folder) for source in elsewhere]
        self.backbone = backbone
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.sampling = sampling or Proportional()
        self.steps_per_epoch, self._seed, self.num_workers = steps_per_epoch, seed, num_workers
        self.predict_split: Split = predict_split
        self._protocol: dict[str, Any] = {"style": style, "bos": bos, "system": system, "answer_prefix": answer_prefix}
        self._protocol |= {"number_format": number_format, "number_steps": number_steps}
        self._encoded: dict[tuple[Split, bool], list[EncodedRow]] = {}

    @property
    def seed(self) -> int:
        """Seed of the order of the rows; Lightning's `seed_everything` leaves the run's own in the environment."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    @cached_property
    def specs(self) -> list[TaskSpec]:
        """The tasks in the order of their ids; reads names, no rows.

        Raises:
            ValueError: Two tasks of one name or a name that stands for something else, or a source that cannot be read.
        """
        specs = [source.spec() for source in self.sources]
        refuse_names([spec.name for spec in specs], "tasks holds")
        return specs

    @property
    def notes(self) -> dict[str, str]:
        """What a table must say of a task's rows, by task name; tasks with nothing to say are absent."""
        pairs = zip(self.specs, self.sources, strict=True)
        return {spec.name: source.note for spec, source in pairs if source.note}

    @cached_property
    def encoder(self) -> Encoder:
        """The encoding protocol of this run."""
        return Encoder(self.backbone.tokenizer(), self.backbone.kind, self.max_length, **self._protocol)

    @cached_property
    def collator(self) -> Collator:
        """Pads for this backbone."""
        backbone = self.backbone
        return Collator(backbone.kind, backbone.tokenizer().pad_token_id, backbone.packs_options(self.max_length))

    def setup(self, stage: str) -> None:
        """Encodes the splits of a stage, so that bad rows and settings are found before any training."""
        if stage == "predict":
            self.rows(self.predict_split, labelled=False)
            return
        for source in self.sources:  # all splits now: a run must not train for an hour and then miss its test rows
            source.require(SPLITS)
        if stage in ("fit", "test"):
            _ = self.outside_rows
        for split in _STAGE_SPLITS.get(stage, ("test",)):
            self.rows(split)
        if stage == "fit":
            self._sampler()

    def rows(self, split: Split, labelled: bool = True) -> list[EncodedRow]:
        """Gives a split's encoded rows, task by task; encoded once.

        Args:
            split: The split.
            labelled: Whether every row must have its answer; prediction does without.
        """
        if (split, labelled) not in self._encoded:
            tasks = enumerate(zip(self.specs, self.sources, strict=True))
            self._encoded[split, labelled] = [
                row
                for task_id, (spec, source) in tasks
                for row in self.encoder.encode(spec, task_id, source.rows(split, labelled))
            ]
        return self._encoded[split, labelled]

    def train_dataloader(self) -> ResumableLoader:
        """Makes the loader of this rank's micro-batches."""
        dataset = TrainRows(self.rows("train"), self.collator)
        return ResumableLoader(dataset, self._sampler(), self.num_workers, self.seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Makes the validation loader."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Makes the test loader."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Makes the loader of `predict_split`, whose rows may lack their answers."""
        return self._evaluation(self.predict_split, labelled=False)

    def sample_prompts(self, count: int, seed: int, tasks: Sequence[int] | None = None) -> list[Batch]:
        """Draws training prompts for fitting a prior: the same on every rank.

        Every task gives equally many; what a small task lacks is shared out among the others.

        Args:
            count: At most so many prompts.
            seed: Decides which.
            tasks: Only of these tasks; of all where not given.

        Returns:
            Prompt-only batches of at most `eval_batch_size` rows.
        """
        rows = [row for row in self.rows("train") if tasks is None or row.task_id in tasks]
        sizes = [size for task, size in enumerate(self._sizes()) if tasks is None or task in tasks]
        return self.prompts([rows[at] for at in sample_equally(sizes, count, [self.seed, seed])])

    @cached_property
    def outside_rows(self) -> dict[str, list[EncodedRow]]:
        """The encoded test prompts of the tasks in `outside`, by task name."""
        names = [source.spec().name for source in self.outside]
        refuse_names([*(spec.name for spec in self.specs), *names], "tasks and outside hold")
        return {source.spec().name: encode_prompts(self.encoder, source) for source in self.outside}

    def prompts(self, rows: Sequence[EncodedRow]) -> list[Batch]:
        """Makes prompt-only batches of at most `eval_batch_size` rows, in order."""
        step = self.eval_batch_size
        return [self.collator.prompts(rows[at : at + step]) for at in range(0, len(rows), step)]

    def majority(self, task_name: str) -> int | None:
        """Gives the most frequent label of a task's training rows; None where an answer is no label.

        Raises:
            ValueError: There is no such task.
        """
        for spec, source in zip(self.specs, self.sources, strict=True):
            if spec.name == task_name:
                return majority_label(source.rows("train")) if spec.has_options else None
        raise ValueError(f"task '{task_name}' is unknown; use one of {', '.join(spec.name for spec in self.specs)}.")

    def cache_key(self, split: Split, labelled: bool = True) -> str:
        """Fingerprints what a model is shown on a split: rows, templates, tokens, answers and metrics (sha256).

        Args:
            split: The split.
            labelled: See `rows`.
        """
        digest = hashlib.sha256(repr((self.backbone.kind, self.specs)).encode())
        for row in self.rows(split, labelled):
            seen = (row.row_id, row.prompt, row.answer, row.options, row.row.get("choices"), row.target)
            digest.update(repr(seen).encode())
        return digest.hexdigest()

    def _sizes(self) -> list[int]:
        counts = Counter(row.task_id for row in self.rows("train"))
        return [counts[task_id] for task_id in range(len(self.specs))]

    def _sampler(self) -> MultitaskSampler:
        world_size, rank, accumulation = place_of(self.trainer)
        return MultitaskSampler(
            self.sampling,
            [spec.name for spec in self.specs],
            self._sizes(),
            [len(row.answer) or 1 for row in self.rows("train")],
            self.batch_size,
            self.steps_per_epoch,
            seed=self.seed,
            world_size=world_size,
            rank=rank,
            accumulation=accumulation,
        )

    def _evaluation(self, split: Split, labelled: bool = True) -> DataLoader[Batch]:
        world_size, rank, _ = place_of(self.trainer)
        rows, packed = self.rows(split, labelled), self.collator.pack
        batches = group_for_evaluation(rows, self.eval_batch_size, world_size, rank, packed)
        return evaluation_loader(EvalBatches(batches, self.collator), self.num_workers, self.seed)
