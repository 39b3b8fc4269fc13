"""What the tools that compare have in common on the command line."""

import argparse
import copy
import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from moe_peft.backbones import Backbone
from moe_peft.command_line import mistakes_in_a_line, quiet
from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.preview import load_data_module

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULTS = [f"--config={CONFIGS / name}" for name in ("bases/smollm2-135m.yaml", "data/quickstart.yaml")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """Options of a comparison; what it does not know is of a run's configuration.

    Args:
        description: the tool's own.
        dtype: default of the base that is timed.
    """

    def __init__(self, description: str | None, dtype: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=form)
        self._least: dict[str, int] = {}
        self.add_argument("--dtype", choices=list(DTYPES), default=dtype, help="of the timed base (%(default)s)")
        self.add_argument("--attention", default="eager", help="ours: eager or sdpa (%(default)s, as in quickstart)")
        self.add_number("--threads", 1, 1, "of torch")
        self.add_argument("--json", type=Path, help="file to write all numbers to")

    def add_number(self, name: str, default: int, least: int, text: str) -> None:
        """Adds an option that takes whole numbers from `least` on."""
        self.add_argument(name, type=int, default=default, help=f"{text} (%(default)s)")
        self._least[name.removeprefix("--")] = least

    def error(self, message: str) -> NoReturn:
        """Raises ValueError instead of printing the usage."""
        raise ValueError(message)

    def read(self) -> tuple[argparse.Namespace, list[str]]:
        """Returns the options, and the arguments of the configuration: base and data are the quickstart's by default.

        Raises:
            ValueError: a value that an option does not take.
        """
        given, others = self.parse_known_args()
        for name, least in self._least.items():
            if getattr(given, name) < least:
                raise ValueError(f"{name}: {getattr(given, name)} is below {least}")
        if given.attention not in ("eager", "sdpa"):
            raise ValueError(f"attention: {given.attention!r} is not accepted; use eager or sdpa")
        if given.json is not None and not given.json.absolute().parent.is_dir():
            raise ValueError(f"json: the folder of '{given.json}' does not exist; make it first")
        configured = any(other.split("=")[0] == "--config" for other in others)
        return given, others if configured else [*DEFAULTS, *others]


def base_of(data: MultitaskDataModule, dtype: str, attention: str) -> Backbone:
    """Returns the configured backbone in another dtype and with another attention."""
    backbone = copy.copy(data.backbone)
    backbone.dtype, backbone.attention = DTYPES[dtype], attention
    return backbone


def run(
    parser: Parser,
    compare: Callable[[argparse.Namespace, MultitaskDataModule], dict[str, Any]],
    needs: tuple[str, ...] = (),
) -> None:
    """Runs a comparison and writes its numbers; a user's mistake ends in one line and status 2, a difference in 1.

    Args:
        parser: of its options.
        compare: prints what it finds and returns the numbers.
        needs: packages that must be there.
    """
    quiet()
    with mistakes_in_a_line(), mistakes_in_a_line(RuntimeError, status=1):
        for name in needs:
            if not any(metadata.distributions(name=name)):
                raise ValueError(f"{name} is not installed: pip install {name}")
        given, others = parser.read()
        found = compare(given, load_data_module(others))
    if given.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "lightning", *needs)}
        about = {"settings": settings, "configuration": others, "python": platform.python_version(), **versions}
        given.json.write_text(json.dumps(about | found, indent=1) + "\n")
