"""The last words of a run: where everything lies, and what to do with it."""

import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

TOOLS = Path(__file__).parents[2] / "tools"
"""Where the tools lie in a checkout; an installed package is without them."""
Entry = tuple[str, str]
"""What something is, and the paths or the command."""


class Summary(Callback):
    """Prints, on rank zero, what a fit or a test has left; after one that broke off, how to go on."""

    def __init__(self) -> None:
        self._trained = self._fitted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that there will be something to tell."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that a test to come is the fit's own, also that of a fit which had no step left to go."""
        self._fitted = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells of a test, which is the end of a fit too."""
        if stage == "test" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(trainer.default_root_dir)
            print_aligned([*(fit_entries(folder) if self._fitted else test_entries(trainer, folder))])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells where it stopped, unless nothing had begun."""
        if self._trained and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print_aligned([*stopped_entries(trainer, Path(trainer.default_root_dir))])


def fit_entries(folder: Path) -> Iterator[Entry]:
    """Gives what lies in the folder of a fit that was tested, and the next commands."""
    checkpoints = folder / "checkpoints"
    yield "run", str(folder)
    yield from existing("checkpoints", checkpoints, "best.ckpt", "last.ckpt")
    yield from existing("results", folder, "results.md", "results.json", "predictions.jsonl")
    yield from existing("metrics", folder, "metrics.csv", "tensorboard")
    yield from existing("routing", folder, "routing")
    saved = [file for name in ("best", "last") if (file := checkpoints / f"{name}.ckpt").is_file()]
    if saved and (folder / "config.yaml").is_file():
        yield "test again", command("test", folder, saved[0])
    if saved:
        export = [folder, "--to", "adapter", "--out", Path("exports") / folder.resolve().name]
        yield from tool("export", "export.py", *export)
        yield from tool("report", "report.py", folder)


def test_entries(trainer: Trainer, folder: Path) -> Iterator[Entry]:
    """Gives what a test alone has written."""
    suffix = f".test-{Path(trainer.ckpt_path).stem if trainer.ckpt_path else 'none'}"
    if trainer.ckpt_path:
        yield "checkpoint", short(Path(trainer.ckpt_path))
    yield from existing("results", folder, f"results{suffix}.md", f"results{suffix}.json", f"predictions{suffix}.jsonl")


def stopped_entries(trainer: Trainer, folder: Path) -> Iterator[Entry]:
    """Gives where a fit, or the test after it, broke off, and the command that goes on."""
    best, last = folder / "checkpoints" / "best.ckpt", folder / "checkpoints" / "last.ckpt"
    if trainer.state.fn != TrainerFn.FITTING:
        if best.is_file() and (folder / "config.yaml").is_file():
            yield "test", command("test", folder, best)
        return
    total = trainer.estimated_stepping_batches
    yield "stopped", f"at step {trainer.global_step}" + ("" if math.isinf(total) else f" of {int(total)}")
    if last.is_file() and (folder / "config.yaml").is_file():
        yield "resume", command("fit", folder, last)
    else:
        yield "resume", "nothing was saved yet; start again in another folder"


def existing(name: str, folder: Path, *files: str) -> Iterator[Entry]:
    """Gives those of a folder's files that are there: the first with its path, the others by name."""
    found = [file for file in files if (folder / file).exists()]
    if found:
        yield name, ", ".join([short(folder / found[0]), *found[1:]])


def command(subcommand: str, folder: Path, checkpoint: Path) -> str:
    """Words a command on a run's own configuration."""
    given = [f"--config={folder / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    return shlex.join(["python", "-m", "moe_peft", subcommand, *given])


def tool(name: str, file: str, *arguments: str | Path) -> Iterator[Entry]:
    """Words a command of one of the tools, if this is a checkout."""
    if (TOOLS / file).is_file():
        yield name, shlex.join(["python", short(TOOLS / file), *map(str, arguments)])


def short(path: Path) -> str:
    """Writes a path as seen from here, where it lies below."""
    inside = path.absolute().is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else str(path)


def print_aligned(entries: list[Entry]) -> None:
    """Prints names and what they stand for in two columns."""
    width = max((len(name) for name, _ in entries), default=0)
    for name, text in entries:
        print(f"{name:<{width}}  {text}", flush=True)
