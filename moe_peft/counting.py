"""Counts parameters of a method on a backbone on the meta device: no download, no memory."""

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from jsonargparse import Namespace

from moe_peft import backbones, embedders, methods
from moe_peft.data.tasks import TaskSpec
from moe_peft.layers import closed_form_router, expert_router
from moe_peft.layers.rank_selector import TaskEmbedding
from moe_peft.methods.base import MultitaskModule
from moe_peft.parsing import ConfigParser

METHODS = [import_module(f"{methods.__name__}.{file.name}") for file in iter_modules(methods.__path__)]
"""All modules of `moe_peft.methods`: a method is known by its class's bare name because its file lies there."""
NAMED = (backbones, embedders, closed_form_router, expert_router, *METHODS)
"""Imported so that their classes are known to the configuration by bare name."""


SECTIONS = ("trainer", "data", "checkpoint", "results", "predictions", "seed_everything", "ckpt_path", "weights_only")
PARTS = ("base", "trainable", "factors", "router", "embeddings", "gates", "prior", "heads")


def model_parser(ignored: Sequence[str] = SECTIONS) -> ConfigParser:
    """Returns a parser of the `model` section alone.

    Args:
        ignored: a run's other sections, which are read and left as they are.
    """
    parser = ConfigParser(description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(MultitaskModule, "model", skip={"tasks"}, required=True)
    for section in ignored:
        parser.add_argument(f"--{section}", type=Any)
    return parser


def build_on_meta(config: Namespace, tasks: int) -> MultitaskModule:
    """Builds the configured method without weights.

    Args:
        config: a parsed configuration.
        tasks: number of placeholder tasks (two classes each).
    """
    parser = model_parser()
    specs = [TaskSpec(f"task{i}", "classification", "accuracy", "{text}", ("no", "yes")) for i in range(tasks)]
    config.model.init_args["tasks"] = specs
    with torch.device("meta"):
        module = parser.instantiate_classes(config)["model"]
        module.configure_model()
    return module


def count_parameters(module: MultitaskModule) -> dict[str, Any]:
    """Counts a built module's parameters.

    Returns:
        base, trainable, percent (trainable of base), per_task (trainable by task), and trainable counts per part:
        factors, router, embeddings (of tasks), gates, prior (its trainable projections), heads.
    """
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in module.named_parameters():
        if module.belongs_to_base(name):
            counts["base"] += parameter.numel()
        if not parameter.requires_grad:
            continue
        counts["trainable"] += parameter.numel()
        counts[part_of(module, name)] += parameter.numel()
    percent = round(100 * counts["trainable"] / counts["base"], 4)
    return counts | {"percent": percent, "per_task": counts["trainable"] // len(module.specs)}


def part_of(module: MultitaskModule, name: str) -> str:
    """Names the part a trainable parameter belongs to."""
    if ".factors." in name:
        return "factors"
    if name.startswith("heads."):
        return "heads"
    owner, _, leaf = name.rpartition(".")
    if isinstance(module.get_submodule(owner), TaskEmbedding):
        return "embeddings"
    if leaf in getattr(module.get_submodule(owner), "gate_names", ()):
        return "gates"
    return "prior" if leaf == "projection" or name.startswith("prior.") else "router"
