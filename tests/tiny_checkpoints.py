"""Checkpoints of tiny saved backbones, written as a fit writes them, for what reads a checkpoint alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_peft.counting import model_parser
from moe_peft.data.tasks import TaskSpec
from tests.methods.tiny_tt import experts_come_alive, with_tasks
from tests.tiny import come_alive, random_batch
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
    batch = random_batch(6, kind)
    if method != "TTLoRAMoE":
        return come_alive(module, batch, scale=0.1).eval()
    experts_come_alive(module, with_tasks(batch, *(row % len(TASKS) for row in range(6))), scale=0.1)
    module.router_trained.fill_(True)
    return module.eval()


def save(module: Any, path: Path) -> Path:
    """Writes a module's checkpoint as a Trainer would."""
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path
