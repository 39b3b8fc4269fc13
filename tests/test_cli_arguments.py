"""What a configuration may not say: one line that names the argument, the value and what is allowed."""

import inspect

import pytest

from moe_peft.counting import model_parser
from moe_peft.messages import arguments_of, one_line
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from tests.tiny import TASKS
from tests.tiny_runs import one_error, refused, world  # noqa: F401  (fixtures)

METHODS = [LoRA, MoRE, TRex, TTLoRA, TTLoRAMoE]
WRONG = {
    "argument": ({"model": {"rnak": 3}}, "model: TRex has no argument 'rnak'; it has r1, r2, mode"),
    "backbone's argument": (
        {"model": {"backbone": {"class_path": "CausalLM", "init_args": {"nme": "x"}}}},
        "model.backbone: CausalLM has no argument 'nme'; it has name, dtype",
    ),
    "type": ({"model": {"r1": "many"}}, "model.r1: 'many' is not accepted; use int"),
    "type in a list": ({"model": {"dropout": [1]}}, "model.dropout: '[1]' is not accepted; use float"),
    "word": ({"model": {"mode": "rank2"}}, "model.mode: 'rank2' is not accepted; use 'mix_and_match', 'rank1'"),
    "value": ({"model": {"r1": 0}}, "r1, r2: 0 and 3, both must be at least 1"),
    "optimizer": (
        {"model": {"optimizer": {"class_path": "torch.optim.Adamm"}}},
        "model.optimizer: module 'torch.optim' has no attribute 'Adamm'",
    ),
    "optimizer's argument": (
        {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}}}},
        "model.optimizer: AdamW has no argument 'lrr'; it has lr, betas",
    ),
    "optimizer's type": (
        {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": "fast"}}}},
        "model.optimizer.lr: 'fast' is not accepted; use float",
    ),
    "nested type": ({"model": {"lr": {"gates": "x"}}}, "model.lr.gates: 'x' is not accepted; use float"),
    "backbone's class": (
        {"model": {"backbone": {"class_path": "CausalLMM"}}},
        "model.backbone: there is no class 'CausalLMM'; use CausalLM, Classifier, Seq2SeqLM",
    ),
    "embedder": (
        {"model": {"embedder": {"class_path": "Tfidff"}}},
        "there is no class 'Tfidff'; use HiddenStates, InputEmbeddings",
    ),
    "data's argument": ({"data": {"batchsize": 3}}, "data: MultitaskDataModule has no argument 'batchsize'; it has"),
    "fraction": ({"data": {"batch_size": 2.5}}, "data.batch_size: '2.5' is not accepted; use int"),
    "sampling": (
        {"data": {"sampling": {"class_path": "Temperatur"}}},
        "data.sampling: there is no class 'Temperatur'; use EqualRows, ExponentialShare",
    ),
    "sampling's argument": (
        {"data": {"sampling": {"class_path": "Temperature", "init_args": {"temp": 1}}}},
        "data.sampling: Temperature has no argument 'temp'; it has temperature",
    ),
    "source's argument": (
        {"data": {"tasks": [{"class_path": "TaskFolder", "init_args": {"pth": "x"}}]}},
        "data.tasks: TaskFolder has no argument 'pth'; it has path",
    ),
    "source's value": (
        {"data": {"tasks": [{"class_path": "TaskFolder", "init_args": {"path": "x", "test_rows": 0}}]}},
        "test_rows=0 leaves no rows; use 1 or more",
    ),
    "trainer's argument": ({"trainer": {"max_epoch": 3}}, "does not accept option 'trainer.max_epoch'"),
    "trainer's type": ({"trainer": {"max_epochs": "two"}}, "trainer.max_epochs: 'two' is not accepted; use int"),
    "callback": (
        {"trainer": {"callbacks": [{"class_path": "SemanticPriorFitt"}]}},
        "trainer.callbacks: there is no class 'SemanticPriorFitt'; use",
    ),
    "callback's argument": (
        {"trainer": {"callbacks": [{"class_path": "SemanticPriorFit", "init_args": {"texts": 2}}]}},
        "trainer.callbacks: SemanticPriorFit has no argument 'texts'; it has max_texts",
    ),
    "precision": ({"trainer": {"precision": "bf16-true"}}, "would store the adapters in half precision"),
    "fsdp": ({"trainer": {"strategy": "fsdp"}}, "use fsdp2 (--config configs/trainer/fsdp.yaml)"),
    "FSDPStrategy": (
        {"trainer": {"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}}},
        "FSDPStrategy' does not shard these models right; use fsdp2",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_named_with_what_is_allowed(refused, name):  # noqa: F811
    sections, expected = WRONG[name]
    assert expected in refused(**sections)


def test_an_unknown_method_lists_the_methods(world, tmp_path, capsys):  # noqa: F811
    spoiled = world.config()
    spoiled["model"]["class_path"] = "TRexx"
    file = world.write(tmp_path / "spoiled.yaml", spoiled)
    error = one_error(capsys, "fit", f"--config={file}")
    assert "model: there is no class 'TRexx'; use AdapterFusion, Adapters, ContextPEFT, " in error


def test_a_wrong_argument_is_named_like_one_in_a_file(refused):  # noqa: F811
    assert refused("--model.r1=x").startswith("error: model.r1: 'x' is not accepted; use int")
    assert "TRex has no argument 'r9'" in refused("--model.r9=3")


@pytest.mark.parametrize(
    "text, expected", [(None, "File does not exist"), ("model: [1,\n  :", "line 2, column 3"), ("- 1\n", "- 1")]
)
def test_an_unreadable_file_is_named(tmp_path, capsys, text, expected):
    file = tmp_path / "broken.yaml"
    if text is not None:
        file.write_text(text)
    assert expected in one_error(capsys, "fit", f"--config={file}")


def test_a_configuration_without_sections_says_what_is_missing(world, tmp_path, capsys):  # noqa: F811
    file = world.write(tmp_path / "bare.yaml", {"trainer": {"max_epochs": 1}})
    assert "required: fit.data, fit.model" in one_error(capsys, "fit", f"--config={file}")


def test_an_unknown_command_lists_the_commands(capsys):
    assert "'train' (choose from 'fit', 'validate', 'test', 'predict')" in one_error(capsys, "train")


def test_messages_of_other_kinds_keep_their_text():
    assert one_line("a: 1\n  b") == "a: 1 b"
    assert len(one_line("x" * 5000)) == 600


def test_arguments_of_a_method_are_its_own_and_its_bases():
    names = arguments_of(TRex)
    assert {"r1", "gate_slope", "backbone", "loss_mean"} <= set(names)
    assert not {"self", "common", "tasks"} & set(names)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_method_repeats_no_shared_argument_with_another_default(method):
    """A configuration whose first file names no method gets the base class's defaults, and keeps them."""
    shared, own = (inspect.signature(kind.__init__).parameters for kind in (MultitaskModule, method))
    assert all(own[name].default == shared[name].default for name in own.keys() & shared.keys())


def test_the_order_of_files_does_not_change_a_methods_own_mean():
    files = ("bases/minilm-l6.yaml", "classify-tt-lora-moe.yaml")
    for order in (files, files[::-1]):
        config = model_parser().parse_args([word for file in order for word in ("--config", f"configs/{file}")])
        config.model.init_args["tasks"] = TASKS
        assert model_parser().instantiate_classes(config)["model"].loss_mean == "task"
