"""Exports against Hugging Face PEFT itself: it loads them, and gives the same outputs."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moe_peft.backbones import CausalLM
from moe_peft.interop import peft as interop
from moe_peft.interop.parity import apply_lora
from moe_peft.interop.peft import LowRank, export_peft, low_rank
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.methods.lora import LoRA
from moe_peft.methods.merging import static_cores
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from tests.tiny import LLAMA, build, come_alive, output, random_batch, randomise, tiny_backbone

KINDS = ["causal", "seq2seq", "classifier"]
SCALINGS = ["rank_over_r", "paper", "none", "code"]
TASKS = ("tone", "topic")


def alive(method, kind="causal", **arguments):
    batch = random_batch(kind=kind)
    return come_alive(build(method, kind, **arguments), batch, scale=0.1).eval(), batch


def of_task(batch, task):
    return {**batch, "task_id": torch.full_like(batch["task_id"], task)}


def base(kind):
    """The plain model that `build` adapted."""
    torch.manual_seed(0)
    return tiny_backbone(kind).load()


def answer(model, batch):
    """What a plain or PEFT model gives for a batch."""
    found = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch})
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


def read(folder, name="adapter_config.json"):
    return json.loads((folder / name).read_text())


@torch.no_grad()
def assert_peft_agrees(module, batch, folder, kind, uniform_rank):
    """Exports both tasks; PEFT, PEFT merged and our own reader give the module's outputs for that task."""
    for task, name in enumerate(TASKS):
        own = output(module, of_task(batch, task))
        export_peft(module, folder / name, name, uniform_rank)
        model = peft.PeftModel.from_pretrained(base(kind), str(folder / name)).eval()
        assert set(load_file(folder / name / "adapter_model.safetensors")) == set(peft.get_peft_model_state_dict(model))
        with model.disable_adapter():
            assert (answer(model, batch) - own).abs().max() > 1e-2
        close(answer(model, batch), own)
        close(answer(model.merge_and_unload(), batch), own)
        close(answer(apply_lora(base(kind), folder / name), batch), own)


@pytest.mark.parametrize("uniform_rank", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_loras_outputs(tmp_path, kind, uniform_rank):
    module, batch = alive(LoRA, kind, rank=3, alpha=10.0)
    assert_peft_agrees(module, batch, tmp_path, kind, uniform_rank)
    assert read(tmp_path / "tone")["rank_pattern"] == read(tmp_path / "tone")["alpha_pattern"] == {}


@pytest.mark.parametrize("uniform_rank", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_mores_outputs_at_several_ranks_of_one_task(tmp_path, kind, scaling, uniform_rank):
    module, batch = alive(MoRE, kind, rank=5, scaling=scaling)
    assert all(len(set(ranks)) >= 3 for ranks in zip(*module.rank_table().values(), strict=True))
    assert_peft_agrees(module, batch, tmp_path, kind, uniform_rank)


@pytest.mark.parametrize("uniform_rank", [False, True])
@pytest.mark.parametrize("method", [TTLoRA, TTLoRAMoE])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_outputs_of_a_tensor_train_and_of_every_expert(tmp_path, kind, method, uniform_rank):
    module = build(method, kind, rank=4, alpha=2.0)
    randomise(module.eval(), scale=0.2)
    module.route_by_task = True
    assert_peft_agrees(module, random_batch(kind=kind), tmp_path, kind, uniform_rank)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in TASKS)
    assert all(torch.equal(first[name], second[name]) for name in first) == (method is TTLoRA)
    if kind == "classifier":
        heads = [load_file(tmp_path / name / "head.safetensors")["weight"] for name in TASKS]
        assert torch.equal(torch.cat(heads), module.heads.linear.weight)


def test_each_linear_gets_its_own_rank_and_scale_from_peft(tmp_path):
    module, _ = alive(MoRE, rank=5)
    export_peft(module, tmp_path / "a", "topic")
    model = peft.PeftModel.from_pretrained(base("causal"), str(tmp_path / "a")).get_base_model()
    cores = static_cores(module, "topic")
    for slot, ranks in module.rank_table().items():
        theirs, rank, layer = model.get_submodule(slot), ranks[1], module.adapted[slot]
        assert theirs.r["default"] == rank
        assert theirs.scaling["default"] == pytest.approx(layer.scale * cores[slot][0].item(), rel=1e-15)
        assert torch.equal(theirs.lora_A["default"].weight, layer.factors.A[:rank])
        assert torch.equal(theirs.lora_B["default"].weight, layer.factors.B[:, :rank])
    adapted = {name.split(".lora_")[0] for name, _ in model.named_modules() if ".lora_A" in name}
    assert adapted == set(module.adapted)


def test_every_pattern_matches_exactly_one_module(tmp_path):
    """Twelve layers, so that names of layer 1 are parts of names of layer 11."""
    backbone = CausalLM("deep", dtype="float32", shape=LLAMA | {"num_hidden_layers": 12}, random_weights=True)
    module = build(MoRE, backbone=backbone, rank=3)
    export_peft(module, tmp_path / "a", "tone")
    config = read(tmp_path / "a")
    names = [name for name, _ in module.model.named_modules()]
    for pattern in ("rank_pattern", "alpha_pattern"):
        assert len(config[pattern]) > 10
        for key in config[pattern]:
            assert len([name for name in names if re.match(rf"(.*\.)?({key})$", name)]) == 1
            assert not re.match(rf"(.*\.)?({key})$", "nested." + key.removeprefix("^").replace("\\", ""))
            assert not re.match(rf"(.*\.)?({key})$", key.removeprefix("^").replace("\\.", "_", 1).replace("\\", ""))


def test_the_uniform_form_has_one_rank_scale_one_and_no_patterns(tmp_path):
    module, _ = alive(MoRE, rank=5)
    export_peft(module, tmp_path / "a", "tone", uniform_rank=True)
    config = read(tmp_path / "a")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 5, {}, {})
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {5}
    for slot, ranks in module.rank_table().items():
        a, b = (tensors[f"base_model.model.{slot}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a[: ranks[0]], module.adapted[slot].factors.A[: ranks[0]])
        assert a[ranks[0] :].count_nonzero() == 0 and b[:, ranks[0] :].count_nonzero() == 0


@pytest.mark.parametrize(("kind", "task_type"), zip(KINDS, interop.TASK_TYPES.values(), strict=True))
def test_the_configuration_names_base_and_task_type(tmp_path, kind, task_type):
    module = build(LoRA, kind, targets=".*(q_proj|SelfAttention.q|query)")
    export_peft(module, tmp_path / "a", 0)
    config = read(tmp_path / "a")
    assert config["task_type"] == task_type and config["base_model_name_or_path"] == f"tiny-{kind}"
    assert config["target_modules"] == list(module.adapted)
    kinds = {"causal": "ForCausalLM", "seq2seq": "ForSeq2SeqLM", "classifier": "ForFeatureExtraction"}
    model = peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "a"))
    assert type(model).__name__ == "PeftModel" + kinds[kind]
    assert peft.LoraConfig.from_pretrained(str(tmp_path / "a")).r == 8


def test_the_rank_table_lies_beside_it(tmp_path):
    module, _ = alive(MoRE, rank=5)
    export_peft(module, tmp_path / "a", "topic")
    table = module.rank_table()
    ranks = {slot: own[1] for slot, own in table.items()}
    found = read(tmp_path / "a", "rank_table.json")
    whose = {"task": "topic", "fingerprint": module.fingerprint}
    assert found == whose | {"ranks": ranks, "tasks": list(TASKS), "table": table}
    lora, _ = alive(LoRA, rank=2)
    export_peft(lora, tmp_path / "b", "tone")
    whose = {"task": "tone", "fingerprint": lora.fingerprint}
    assert read(tmp_path / "b", "rank_table.json") == whose | {"ranks": dict.fromkeys(lora.adapted, 2)}


def test_a_classifiers_head_lies_beside_it(tmp_path):
    module, _ = alive(MoRE, "classifier", rank=5)
    export_peft(module, tmp_path / "a", "topic")
    head = load_file(tmp_path / "a" / "head.safetensors")
    features = torch.randn(4, 32)
    expected = torch.tensor(module.heads.scores(features, torch.ones(4, dtype=torch.int64)))
    close(nn.functional.linear(features, head["weight"], head["bias"]).log_softmax(-1), expected)
    about = {"task": "topic", "kind": "classification", "labels": ["a", "b", "c"], "pooling": "mean"}
    assert read(tmp_path / "a", "head.json") == about
    causal, _ = alive(LoRA)
    export_peft(causal, tmp_path / "b", "tone")
    assert not list((tmp_path / "b").glob("head*"))


def test_a_merged_module_exports_the_same_files(tmp_path):
    module, _ = alive(MoRE, rank=5)
    export_peft(module, tmp_path / "a", "tone")
    module.merge("topic")
    export_peft(module, tmp_path / "b", "tone")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_name_that_ends_a_longer_one_targets_its_own_linear_only(tmp_path):
    """In PEFT a list's `up` also means `block.up`, which was not adapted."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.block = nn.Linear(4, 4), nn.ModuleDict({"up": nn.Linear(4, 4)})
            self.config = type("Config", (dict,), {"to_dict": dict, "is_encoder_decoder": False})()

        def forward(self, x):
            return self.block["up"](self.up(x))

    class Backbone(CausalLM):
        def load(self):
            return Nested().requires_grad_(False).eval()

    module = build(LoRA, backbone=Backbone("nested", dtype="float32"), targets="up", rank=2)
    assert list(module.adapted) == ["up"]
    nn.init.normal_(module.adapted["up"].factors.B)
    export_peft(module, tmp_path / "a", "tone")
    torch.manual_seed(0)
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "a"))
    config.task_type = None
    theirs = peft.PeftModel.from_pretrained(Nested(), str(tmp_path / "a"), config=config)
    assert [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.up"]
    x = torch.randn(3, 4)
    close(theirs(x), module.model(x))


def layer(core_rank=3, columns=3):
    torch.manual_seed(0)
    module = build(LoRA, rank=core_rank)
    adapted: AdaptedLinear = next(iter(module.adapted.values()))
    adapted.factors.B.data = torch.randn(adapted.out_features, columns)
    return adapted


@pytest.mark.parametrize(
    ("core", "rank"),
    [(None, 3), (torch.tensor([0.5, 0.5, 0.0]), 2), (torch.tensor([0.1, 0.7, 0.0]), 2), (torch.tensor([0, 2.0, 0]), 1),
     (torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), 3),
     (torch.randn(2, 3, generator=torch.Generator().manual_seed(1)), 2)],
    ids=["identity", "scalar", "diagonal", "middle", "tall", "flat"],
)  # fmt: skip
def test_a_core_is_folded_into_factors_and_scale(core, rank):
    adapted = layer(columns=len(core) if core is not None and core.dim() == 2 else 3)
    update = low_rank(adapted, core)
    assert update.a.shape[0] == update.b.shape[1] == rank
    expected = adapted.merged_weight(core) - adapted.base.weight
    close(update.scale * update.b @ update.a, expected)
    padded = update.padded(6)
    assert padded.scale == 1.0 and len(padded.a) == padded.b.shape[1] == 6
    close(padded.b @ padded.a, expected)
    assert isinstance(padded, LowRank)


def test_a_method_that_reads_the_input_cannot_be_exported(tmp_path):
    module, _ = alive(TRex, r1=2, r2=3)
    with pytest.raises(ValueError, match="^TRex cannot be merged or exported as a LoRA"):
        export_peft(module, tmp_path / "a", "tone")
    assert not any(tmp_path.iterdir())


def test_an_unknown_task_writes_nothing(tmp_path):
    module, _ = alive(LoRA)
    with pytest.raises(ValueError, match="^task: there is no task 'tune'; use one of tone"):
        export_peft(module, tmp_path / "a", "tune")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_taken_path_is_refused_and_left_alone(tmp_path, taken):
    module, _ = alive(LoRA)
    out: Path = tmp_path / "a"
    other = out if taken == "file" else out / "notes.txt"
    other.parent.mkdir(exist_ok=True)
    other.write_text("mine")
    with pytest.raises(ValueError, match=r"^out: '.*a' exists and is not an empty folder; name another one$"):
        export_peft(module, out, "tone")
    assert other.read_text() == "mine" and [path.name for path in tmp_path.rglob("*")] == (
        ["a"] if taken == "file" else ["a", "notes.txt"]
    )


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    module, _ = alive(LoRA)
    (tmp_path / "a").mkdir()
    for out in (tmp_path / "a", tmp_path / "b" / "c"):
        export_peft(module, out, "tone")
        assert sorted(file.name for file in out.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "rank_table.json",
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_failure_midway_leaves_no_folder(tmp_path, monkeypatch):
    module, _ = alive(LoRA)

    def fails(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(interop, "adapter_config", fails)
    with pytest.raises(OSError, match="no space left"):
        export_peft(module, tmp_path / "a", "tone")
    assert not any(tmp_path.iterdir())
