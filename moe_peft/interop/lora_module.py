"""A LoRA in Hugging Face PEFT's files as a method, for inference, evaluation and export, without training."""

import re
from pathlib import Path

from moe_peft.backbones import Backbone
from moe_peft.data.tasks import TaskSpec
from moe_peft.interop.fit import refuse_unfit
from moe_peft.interop.heads import check_head, install_head
from moe_peft.interop.lora_import import Lora, read_lora
from moe_peft.methods.lora import Imported, LoRA
from moe_peft.sharding import assign


def lora_module(folder: str | Path, backbone: Backbone) -> LoRA:
    """Makes the LoRA that PEFT wrote, in eval mode; `export_peft` writes its tensors and configuration back.

    It serves one task, called as its head or rank table say, else as the folder.

    Args:
        folder: where it lies, or its id on a hub.
        backbone: the base that it was trained on.

    Raises:
        ValueError: see `read_lora` and `refuse_unfit`; or a LoRA without a head on a backbone that needs one.
    """
    lora = read_lora(folder)
    config = lora.config
    module = LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        rank_pattern=config.get("rank_pattern"),
        alpha_pattern=config.get("alpha_pattern"),
        use_rslora=bool(config.get("use_rslora")),
        backbone=backbone,
        tasks=[_spec(lora, backbone)],
        targets="|".join(map(re.escape, lora.updates)),
    )
    where = f"'{lora.folder}'"
    try:
        module.configure_model()
    except ValueError as error:
        if not str(error).startswith("targets: "):
            raise
        slot = next(iter(lora.updates))
        raise ValueError(f"{where} adapts {slot} and others, which this backbone does not have; another base") from None
    refuse_unfit(module, lora, where)
    for slot, update in lora.updates.items():
        factors = module.adapted[slot].factors
        for name, value in (("A", update.a), ("B", update.b)):
            assign(factors.get_parameter(name), value)
    if lora.head is not None:
        check_head(module, lora.head, 0, where)
        install_head(module, lora.head, 0)
    module.imported = Imported(config, lora.dtype)
    return module.eval()


def _spec(lora: Lora, backbone: Backbone) -> TaskSpec:
    """Returns the one task that a LoRA serves."""
    head, wants = lora.head, backbone.kind == "classifier"
    if (head is not None) != wants:
        state, fix = (
            ("lacks", "export it with its head") if wants else ("has", "give the Classifier that it belongs to")
        )
        raise ValueError(f"'{lora.folder}' {state} a head; {fix}")
    if head is None:
        return TaskSpec(lora.task, "generation", "exact_match", "{text}")
    metric = "pearson" if head.kind == "regression" else "accuracy"
    return TaskSpec(lora.task, head.kind, metric, "{text}", head.choices)  # type: ignore[arg-type]
