"""LoRAs that Hugging Face PEFT wrote, as experts of a mixture: the same update, or the error that is reported."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_peft.interop.install import check, install, read_any
from moe_peft.interop.lora_import import read_lora
from moe_peft.interop.peft import export_peft
from moe_peft.layers.tensor_train import reconstruct
from moe_peft.methods.expert_rows import expert_rows
from moe_peft.methods.lora import LoRA
from tests.methods.tiny_tt import TASKS, blank, rows_for, with_tasks
from tests.tiny import build, output, randomise, tiny_backbone

FULL = 32
"""A rank at which every bond of the tiny model's trains is as wide as its modes allow."""
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 5, r"self_attn\.[qk]_proj": 2, "proj": 7, "^up_proj": 8},
    "alpha_pattern": {"v_proj": 6, r".*layers\.1.*": 12, "down_proj": 1},
}
"""By PEFT's rule the first match counts: "proj" is no end of a name from a dot on, "^up_proj" no beginning."""


def plain(kind="causal"):
    """The model that `build` adapts."""
    torch.manual_seed(0)
    return tiny_backbone(kind).load()


def written(folder, kind="causal", **options):
    """Lets PEFT write a LoRA whose every number is random."""
    given = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear"} | options
    model = peft.get_peft_model(plain(kind), peft.LoraConfig(**given)).eval()
    randomise(model, scale=0.2)
    model.save_pretrained(folder)


def reread(folder, kind="causal"):
    """The adapted model as PEFT reads it back: it writes the patterns in another order, and the order counts."""
    return peft.PeftModel.from_pretrained(plain(kind), str(folder)).eval()


def deltas(model):
    """PEFT's own dense update of every linear."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def update(module, slot, expert):
    """The dense update of one expert in a mixture."""
    layer = module.adapted[slot]
    return layer.scale * reconstruct([core.detach()[expert] for core in layer.factors.cores], layer.factors.layout)


def mixture(kind="causal", **options):
    """A mixture of random experts."""
    module = blank(kind, **options)
    randomise(module)
    return module.eval()


def relative(found, given):
    return ((found.double() - given.double()).norm() / given.double().norm()).item()


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_alphas_and_scales_are_those_of_peft(tmp_path, rslora):
    written(tmp_path / "a", use_rslora=rslora, **PATTERNS)
    lora, expected = read_lora(tmp_path / "a"), deltas(reread(tmp_path / "a"))
    assert lora.updates.keys() == expected.keys()
    assert {len(own.a) for own in lora.updates.values()} == {2, 3, 5}
    for slot, own in lora.updates.items():
        assert expected[slot].abs().max() > 1e-3
        torch.testing.assert_close(own.scale * own.b @ own.a, expected[slot], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_at_full_rank_the_mixture_answers_as_peft_does(tmp_path, kind):
    written(tmp_path / "a", kind, **(PATTERNS if kind == "causal" else {}))
    model = reread(tmp_path / "a", kind)
    module = mixture(kind, rank=FULL, alpha=4.0)
    done = install(module, read_any(tmp_path / "a"), 1)
    assert done.errors.keys() == module.adapted.keys() and max(done.errors.values()) < 1e-6 and done.error < 1e-6
    for slot, expected in deltas(model).items():
        torch.testing.assert_close(update(module, slot, 1), expected, rtol=0, atol=1e-5)
    batch = rows_for(kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", *(["labels"] * (kind == "seq2seq")))}
    with torch.no_grad():
        own = output(module, with_tasks(batch, *[1] * 6))
        with model.disable_adapter():
            assert (model(**inputs).logits - own).abs().max() > 1e-2
        torch.testing.assert_close(model(**inputs).logits, own, rtol=0, atol=1e-4)


def test_at_a_low_rank_the_errors_are_those_of_the_dense_matrices(tmp_path):
    written(tmp_path / "a", r=6, alpha_pattern=PATTERNS["alpha_pattern"])
    expected = deltas(reread(tmp_path / "a"))
    module = mixture(rank=2, alpha=3.0)
    done = install(module, read_any(tmp_path / "a"), 2)
    found = {slot: update(module, slot, 2) for slot in expected}
    assert min(done.errors.values()) > 0.1
    for slot, given in expected.items():
        assert done.errors[slot] == pytest.approx(relative(found[slot], given), abs=1e-5)
    whole = relative(*(torch.cat([own[slot].flatten() for slot in expected]) for own in (found, expected)))
    assert done.error == pytest.approx(whole, abs=1e-5)
    worst = max(done.errors, key=done.errors.get)
    assert str(done).startswith(
        f"expert of task2: from '{tmp_path / 'a'}', compressed with relative error {whole:.2g} "
        f"(at most {done.errors[worst]:.2g}, {worst})"
    )


def test_linears_that_a_lora_lacks_get_no_update_and_other_experts_stay(tmp_path):
    written(tmp_path / "a", target_modules=["q_proj"])
    module = mixture()
    before = {name: value.detach().clone() for name, (value, _) in expert_rows(module).items()}
    done = install(module, read_any(tmp_path / "a"), 1)
    lacking = [slot for slot in module.adapted if not slot.endswith("q_proj")]
    assert done.notes[0] == f"{len(lacking)} linears that it lacks get no update, first {lacking[0]}"
    assert done.errors.keys() == module.adapted.keys() - set(lacking)
    for slot in module.adapted:
        assert (update(module, slot, 1).abs().max() == 0) == (slot in lacking)
    for name, (value, _) in expert_rows(module).items():
        assert torch.equal(value[[0, 2]], before[name][[0, 2]])


def test_our_own_lora_exports_bring_head_and_task(tmp_path):
    source = build(LoRA, "classifier", tasks=TASKS, rank=3)
    randomise(source, scale=0.2)
    export_peft(source, tmp_path / "a", "task2")
    module = mixture("classifier", rank=FULL)
    lora = read_lora(tmp_path / "a")
    assert lora.task == "task2"
    assert install(module, lora, 2).notes == []
    batch = with_tasks(rows_for("classifier"), *[2] * 6)
    with torch.no_grad():
        torch.testing.assert_close(module(batch), source(batch), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"classes \['good', 'neutral', 'bad', 'mixed'\], task 'task1' of "):
        check(module, lora, 1)
    with pytest.raises(ValueError, match="has a head for the classes of 'task2'; configure the Classifier backbone"):
        check(blank(), lora._replace(updates={}, fingerprint=None), 2)
    with pytest.raises(ValueError, match="is of another base: fingerprint .*; configure its backbone, tiny-classifier"):
        check(blank(), lora, 2)
    wide = lora.head._replace(weight=torch.zeros(4, 33))
    with pytest.raises(ValueError, match=r"its head has shape \[4, 33\], not \[4, 32\]; another base"):
        check(module, lora._replace(head=wide), 2)


def test_a_task_is_named_by_the_rank_table_or_else_by_the_folder(tmp_path):
    written(tmp_path / "mood")
    assert read_lora(tmp_path / "mood").task == "mood"
    source = build(LoRA, tasks=TASKS, rank=3)
    export_peft(source, tmp_path / "b", "task1")
    assert read_lora(tmp_path / "b").task == "task1"


def spoil(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_name_of_the_base_is_worth_a_note(tmp_path):
    written(tmp_path / "a")
    spoil(tmp_path / "a", base_model_name_or_path="org/model")
    notes = install(mixture(), read_any(tmp_path / "a"), 1).notes
    assert notes == ["it calls its base 'org/model', the backbone here is 'tiny-causal'"]


# ---- what is no plain LoRA, or does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "adapter_config.json': use_dora is True, which is no plain LoRA"),
        ({"bias": "all"}, r"safetensors': \S+\.bias \[\d+\] is no lora_A or lora_B of a linear"),
        ({"lora_bias": True}, r"safetensors': \S+\.lora_B\.bias \[\d+\] is no lora_A or lora_B of a linear"),
        ({"target_modules": ["query", "word_embeddings"]}, r"word_embeddings\.lora_embedding_A \[3, 97\] is no lora_A"),
        ({"modules_to_save": ["LayerNorm"]}, r"modules_to_save is \['LayerNorm'\], which is no plain LoRA"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights 'pissa' changed the base itself; convert it to a plain LoRA",
        ),
    ],
    ids=str,
)
def test_adapters_that_are_more_than_a_lora_are_refused(tmp_path, options, message):
    written(tmp_path / "a", "classifier", **options)
    with pytest.raises(ValueError, match=message) as caught:
        read_any(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_biases_that_were_not_trained_are_no_obstacle(tmp_path):
    written(tmp_path / "a", bias="all")  # a Llama has none
    assert read_lora(tmp_path / "a").updates


def change(folder, spoil_tensors):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil_tensors(tensors, sorted(tensors))
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "; convert it to safetensors"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x" * 40), "is truncated or no safetensors file"),
        (lambda a: spoil(a, peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
        (lambda a: spoil(a, r=4), r"q_proj has rank 4, but its A and B are \[3, 32\] and \[32, 3\]"),
        (lambda a: spoil(a, r=None), "gives no rank and alpha for "),
        (lambda a: spoil(a, rank_pattern={"(": 3}), "gives no rank and alpha for "),
        (lambda a: change(a, lambda own, names: own.pop(names[0])), "has only lora_B; export the folder again"),
        (lambda a: change(a, lambda own, names: own.clear()), "holds no tensors"),
        (lambda a: change(a, lambda own, names: own[names[1]].fill_(torch.nan)), "lora_B.weight holds values that"),
        (lambda a: change(a, lambda own, names: own.update({names[0]: torch.ones(3, 32, 1, 1)})), "is no lora_A or"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_gives_one_line(tmp_path, break_it, message):
    written(tmp_path / "a", target_modules=["q_proj"])
    break_it(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as caught:
        read_any(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_lora_of_another_model_is_refused(tmp_path):
    written(tmp_path / "a", target_modules=["q_proj"])
    lora = read_lora(tmp_path / "a")
    slot = next(iter(lora.updates))
    own = lora.updates[slot]
    with pytest.raises(ValueError, match=r"q_proj is 33x32 there and 32x32 here; another base"):
        check(mixture(), lora._replace(updates={slot: own._replace(a=torch.ones(3, 33))}), 1)
    with pytest.raises(ValueError, match=r"adapts \S+q_proj, which TTLoRAMoE here does not; set targets"):
        check(mixture(targets=["k_proj"]), lora, 1)
    with pytest.raises(ValueError, match="has no head for the classes of 'task1'"):
        check(mixture("classifier"), lora._replace(updates={}), 1)
