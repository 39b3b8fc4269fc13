"""One more expert for a trained mixture, in a run folder of its own (the logic of `tools/add_expert.py`).

The expert was trained elsewhere. Of the mixture only the router learns, from training prompts; see `methods.growing`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from moe_peft.checkpoint import describe, read_checkpoint, refuse_foreign
from moe_peft.data.preview import load_data_module
from moe_peft.data.tasks import SPLITS, TaskSpec
from moe_peft.interop.folder import new_folder
from moe_peft.interop.install import Installed, check, install, read_any
from moe_peft.methods.growing import Routed, grown_state, learn_expert, refuse_changed, rows_to_learn
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.runs import find_checkpoint, untrained


class Growth(NamedTuple):
    """What one more expert did to a mixture."""

    folder: Path
    installed: Installed
    routing: list[Routed]

    def __str__(self) -> str:
        """Returns a line about the expert, a table of the routing, and how to go on."""
        width = max(len(each.task) for each in self.routing)
        lines = [
            str(self.installed),
            "validation rows that find their own expert, before and after, and to the new one:",
        ]
        for each in self.routing:
            before = "   new" if each.before is None else f"{each.before:6.1%}"
            line = f"  {each.task:{width}}  n={each.rows:<4} {before:>6} {each.after:6.1%} {each.to_new:6.1%}"
            lines.append(line)
        lines.append(f"{len(self.routing)} experts; those that were there, and their heads, kept every bit (checked)")
        run = f"--config {self.folder}/config.yaml --ckpt_path {self.folder}/checkpoints/best.ckpt"
        return "\n".join([*lines, f"python -m moe_peft test {run}"])


def add_expert(
    run: Path, folder: Path, task: str, out: Path, rows: int | None = None, backbone: str | None = None
) -> Growth:
    """Adds an expert to a trained mixture and writes the grown one as a run folder, whole or not at all.

    Args:
        run: the mixture's run folder.
        folder: the expert: what `tools/export.py --to expert` wrote, or a LoRA in Hugging Face PEFT's files.
        task: where its task's rows are: a task folder (below the run's data.root), or a source as YAML.
        out: the folder to write; no such path yet, or an empty folder.
        rows: training rows of a task that the router learns from; the router decides where not given.
        backbone: where the backbone's files lie on this machine, if not where they lay in training.

    Raises:
        ValueError: what does not fit, before anything is written.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows: {rows} must be 1 or more")
    expert, path = read_any(folder), find_checkpoint(run)
    content = read_checkpoint(path, "run")
    with new_folder(out) as made:
        config = made / "config.yaml"
        config.write_text(yaml.safe_dump(grown_config(run, task, out, backbone), sort_keys=False), encoding="utf-8")
        data = load_data_module(["--config", str(config)])
        data.sources[-1].require(SPLITS)
        module = grown_module(path, content, data.specs, backbone)
        new = len(module.specs) - 1
        check(module, expert, new)
        count, tasks = rows_to_learn(module, rows)
        training = data.sample_prompts(count * len(tasks), 0, tasks)
        validation = data.prompts(data.rows("validation"))
        installed = install(module, expert, new)
        routing = learn_expert(module, training, validation)
        refuse_changed(module, content["state_dict"])
        (made / "checkpoints").mkdir()
        kept = {name: content[name] for name in ("epoch", "global_step", "pytorch-lightning_version")}
        checkpoint: dict[str, Any] = kept | {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, made / "checkpoints" / "best.ckpt")
    return Growth(out, installed, routing)


def grown_config(run: Path, task: str, out: Path, backbone: str | None) -> dict[str, Any]:
    """Returns a run's configuration with one more task, another folder and, where given, another place of the backbone.

    Tasks from elsewhere (`data.outside`) are left out: the new one may have been among them.

    Raises:
        ValueError: a run without a configuration, or a task that is no YAML.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run: '{file}' is no file; name the folder of a run, which says where its tasks' rows are")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    source: Any = {"class_path": "moe_peft.data.sources.TaskFolder", "init_args": {"path": task}}
    if task.lstrip().startswith("{"):
        try:
            source = yaml.safe_load(task)
        except yaml.YAMLError:
            raise ValueError(
                f"task: {task!r} is no YAML; give a folder, or {{class_path: ..., init_args: ...}}"
            ) from None
    config["data"]["init_args"]["tasks"].append(source)
    config["data"]["init_args"]["outside"] = None
    config["trainer"]["default_root_dir"] = str(out)
    if backbone is not None:
        config["model"]["init_args"]["backbone"]["init_args"]["name"] = backbone
    config["ckpt_path"] = None
    return config


def grown_module(path: Path, content: dict[str, Any], specs: list[TaskSpec], backbone: str | None) -> TTLoRAMoE:
    """Rebuilds a trained mixture with one more expert, whose rows are zero, in eval mode.

    Raises:
        ValueError: no mixture, one without a trained router, or other tasks than it was trained on.
    """
    about = content["moe_peft"]
    names, wanted = [spec.name for spec in specs], about["tasks"]
    if names[:-1] != wanted:
        raise ValueError(f"run: its configuration has tasks {names[:-1]}, its checkpoint {wanted}; name a whole run")
    module = untrained(path, content, backbone, specs)
    if not isinstance(module, TTLoRAMoE):
        raise ValueError(f"run: a {type(module).__name__} has no experts to add to; name a run of TTLoRAMoE")
    if not content["state_dict"]["router_trained"]:
        raise ValueError("run: the router of this mixture was never trained; train it first")
    module.configure_model()
    refuse_foreign(content, describe(module), tasks=False)
    module.load_state_dict(grown_state(module, content["state_dict"], about))
    module.eval()
    return module
