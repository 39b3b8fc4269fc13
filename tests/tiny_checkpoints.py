"""Checkpoints of tiny saved backbones, written as a fit writes them, for what reads a checkpoint alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_peft.batch import Batch
from moe_peft.counting import model_parser
from moe_peft.data.tasks import TaskSpec
from tests.tiny import come_alive, output, random_batch, randomise
from tests.tiny_runs import save_backbone

TASKS = [
    TaskSpec("tone", "classification", "accuracy", "{text}", ("bad", "good")),
    TaskSpec("sci/topic", "classification", "accuracy/macro_f1", "About: {text}", ("a", "b", "c")),
    TaskSpec("mood", "classification", "accuracy", "{text}", ("up", "down")),
]
CLASSES = {"causal": "CausalLM", "seq2seq": "Seq2SeqLM", "classifier": "Classifier"}


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of saved random models with tokenizers, by kind."""
    root = tmp_path_factory.mktemp("backbones")
    return {kind: save_backbone(root / kind, kind) for kind in CLASSES}


def trained(folder: Path, method: str, kind: str = "causal", dtype: str = "float32", **arguments: Any) -> Any:
    """A method on a saved backbone, every tensor alive, as the command line would have configured and trained it."""
    backbone = {"class_path": CLASSES[kind], "init_args": {"name": str(folder), "dtype": dtype}}
    parser = model_parser()
    section = {"class_path": method, "init_args": {"backbone": backbone, **arguments}}
    parsed = parser.parse_object({"model": section})
    config = parsed.model.as_dict()
    parsed.model.init_args["tasks"] = TASKS
    torch.manual_seed(0)
    module = parser.instantiate_classes(parsed)["model"]
    module.config = config
    module.configure_model()
    return (come_alive_by_stages if method == "TTLoRAMoE" else come_alive)(
        module, random_batch(6, kind), scale=0.1
    ).eval()


def come_alive_by_stages(module: Any, batch: Batch, scale: float) -> Any:
    """A TT-LoRA MoE's experts and router, random, proved to act and to learn, each by its own loss."""
    randomise(module, scale=scale)
    batch = batch | {"task_id": torch.arange(len(batch["task_id"])) % len(TASKS)}
    batch["task_share"] = torch.bincount(batch["task_id"])[batch["task_id"]].float()
    with torch.no_grad():
        adapted = output(module, batch)
        with module.context.disabled():
            bare = output(module, batch)
    assert ((adapted - bare).abs().flatten(1).amax(1) > 1e-3).all(), "an expert does not move the output of its rows"
    module.begin(batch)
    sum(module.step_losses(batch).values()).backward()
    for name, parameter in module.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.abs().max() > 0), name
    module.zero_grad(set_to_none=True)
    module.router_trained.fill_(True)
    return module


def save(module: Any, path: Path) -> Path:
    """Writes a module's checkpoint as a Trainer would."""
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path
