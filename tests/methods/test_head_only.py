"""Heads alone: nothing else learns, and everything that expects adapters copes without any."""

import pytest

from moe_peft.cli import run
from moe_peft.counting import count_parameters
from moe_peft.interop.export import export
from moe_peft.interop.peft import export_peft
from moe_peft.methods.head_only import HeadOnly
from moe_peft.reporting.command import report
from moe_peft.runs import load_module
from tests.tiny import build, random_batch
from tests.tiny_counts import meta
from tests.tiny_fits import assert_reproduced, retest
from tests.tiny_runs import results, world  # noqa: F401  (a fixture)


@pytest.fixture
def folder(world, tmp_path):  # noqa: F811
    """A run."""
    config = world.config(("tone", "mood", "stars"), "classifier")
    config["model"] = {
        "class_path": "HeadOnly",
        "init_args": {"backbone": config["model"]["init_args"]["backbone"], "optimizer": OPTIMIZER},
    }
    config["trainer"]["callbacks"] = [{"class_path": "RoutingReport"}]
    world.fit(tmp_path / "run", config)
    return tmp_path / "run"


OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}


def test_a_run_learns_its_heads_and_is_tested_exported_and_reported(folder, tmp_path):
    run(retest(folder))
    assert_reproduced(folder)
    found, (width, classes) = results(folder / "results.json"), (32, 2 + 3 + 1)
    assert found["method"] == "HeadOnly" and found["trainable_parameters"] == classes * (width + 1)
    module = load_module(folder)
    (done,) = export(module, "adapter", None, tmp_path / "adapter")
    assert done.parity.difference == 0.0 and report([folder]).is_file()


def test_only_heads_have_a_gradient_and_the_base_keeps_no_activations():
    module, batch = build(HeadOnly, "classifier"), random_batch(kind="classifier")
    module.begin(batch)
    assert not module.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state.requires_grad
    module(batch).sum().backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == {
        "heads.linear.weight",
        "heads.linear.bias",
    }


@pytest.mark.parametrize("write", [export_peft, lambda module, out, task: export(module, "merged", task, out)])
def test_there_is_nothing_to_merge(write, tmp_path):
    with pytest.raises(ValueError, match="HeadOnly cannot be merged or exported as a LoRA: it has no adapters"):
        write(build(HeadOnly, "classifier"), tmp_path / "out", "tone")
    assert not (tmp_path / "out").exists()


def test_without_heads_nothing_learns():
    with pytest.raises(ValueError, match="train_heads: false leaves HeadOnly nothing to train; leave it out"):
        build(HeadOnly, "classifier", train_heads=False)


def test_counts():
    counts = count_parameters(meta("head-only", "minilm-l6", tasks=3))
    assert counts["trainable"] == counts["heads"] == 3 * 2 * (384 + 1)
