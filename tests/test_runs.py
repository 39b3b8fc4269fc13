"""A module out of its checkpoint alone, in another process, gives what it gave."""

import shutil
import subprocess
import sys

import pytest
import torch

from moe_peft.runs import find_checkpoint, load_module
from tests.tiny import output, random_batch
from tests.tiny_checkpoints import TASKS, backbones, save, trained  # noqa: F401  (a fixture)
from tests.tiny_runs import world  # noqa: F401  (a fixture)

METHODS = {
    "LoRA": {"rank": 2},
    "TRex": {"r1": 2, "r2": 3},
    "MoRE": {"rank": 5, "experts": 3, "scaling": "paper", "embedding_dim": 6},
}
CASES = [("LoRA", "causal"), ("TRex", "causal"), ("MoRE", "causal"), ("MoRE", "classifier")]
SCRIPT = """
import sys, torch
from moe_peft.runs import load_module
from tests.tiny import output, random_batch
for path, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    module = load_module(path)
    assert not module.training
    with torch.no_grad():
        torch.save(output(module, random_batch(5, kind)), path + ".out")
"""


@pytest.fixture
def checkpoint(backbones, tmp_path):  # noqa: F811
    """A LoRA's checkpoint."""
    return save(trained(backbones["causal"], "LoRA"), tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_a_new_process_gives_the_same_outputs_to_the_bit(backbones, tmp_path):  # noqa: F811
    arguments, expected = [], []
    for at, (method, kind) in enumerate(CASES):
        module = trained(backbones[kind], method, kind, **METHODS[method])
        arguments += [str(save(module, tmp_path / f"{at}.ckpt")), kind]
        with torch.no_grad():
            expected.append(output(module, random_batch(5, kind)))
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True)
    for path, own in zip(arguments[::2], expected, strict=True):
        assert torch.equal(torch.load(path + ".out"), own)


@pytest.mark.parametrize("method", METHODS)
def test_the_module_is_the_one_that_was_saved(backbones, tmp_path, method):  # noqa: F811
    module = trained(backbones["causal"], method, **METHODS[method])
    found = load_module(save(module, tmp_path / "a.ckpt"))
    assert type(found) is type(module) and found.specs == TASKS and found.config == module.config
    assert found.adapter_state().keys() == module.adapter_state().keys()
    for name, value in module.adapter_state().items():
        assert torch.equal(found.adapter_state()[name], value)
    assert save(found, tmp_path / "b.ckpt").read_bytes()  # and can be saved again
    assert load_module(tmp_path / "b.ckpt").config == module.config


@torch.no_grad()
def test_the_run_of_a_real_fit_loads(world, tmp_path):  # noqa: F811
    config = world.config()
    arguments = {name: value for name, value in config["model"]["init_args"].items() if name not in ("r1", "r2")}
    config["model"] = {"class_path": "MoRE", "init_args": arguments | {"rank": 3, "embedding_dim": 4}}
    config["trainer"] |= {"callbacks": [], "max_epochs": 1}
    fitted = world.fit(tmp_path / "run", config).model.eval()
    module = load_module(tmp_path / "run")
    assert module.specs == fitted.specs and module.rank_table() == fitted.rank_table()
    assert torch.equal(output(module, random_batch()), output(fitted, random_batch()))
    assert not torch.equal(output(module, random_batch()), bare_output(module, random_batch()))


def bare_output(module, batch):
    with module.context.disabled():
        return output(module, batch)


def test_a_run_folder_means_its_best_checkpoint_else_its_last(checkpoint):
    run, best = checkpoint.parents[1], checkpoint.with_name("best.ckpt")
    assert find_checkpoint(run) == find_checkpoint(str(checkpoint)) == checkpoint
    shutil.copy(checkpoint, best)
    assert find_checkpoint(run) == best and find_checkpoint(checkpoint) == checkpoint


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoints/best\.ckpt or last\.ckpt, .*give a run, a checkpoint"):
        load_module(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no file; give a checkpoint"):
        load_module(tmp_path / "a.ckpt")


def spoilt(path, **changes):
    """Changes what a checkpoint says of itself; None takes an entry out."""
    content = torch.load(path, weights_only=True)
    content["moe_peft"] |= changes
    content["moe_peft"] = {name: value for name, value in content["moe_peft"].items() if value is not None}
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("name", "what"), [("specs", "its tasks' specifications"), ("config", "configuration")])
def test_a_checkpoint_that_cannot_stand_alone_is_refused(checkpoint, name, what):
    with pytest.raises(ValueError, match=rf"last\.ckpt' lacks .*{what}; train or resume it") as caught:
        load_module(spoilt(checkpoint, **{name: None}))
    assert "\n" not in str(caught.value)


def test_a_method_that_is_unknown_here_is_refused_in_one_line(checkpoint):
    with pytest.raises(ValueError, match=r"last\.ckpt' has a model that is unknown here: .*NoSuchMethod") as caught:
        load_module(spoilt(checkpoint, config={"class_path": "NoSuchMethod", "init_args": {}}))
    assert "\n" not in str(caught.value)


def test_the_backbone_may_lie_elsewhere(backbones, checkpoint, tmp_path):  # noqa: F811
    moved = tmp_path / "moved"
    shutil.copytree(backbones["causal"], moved)
    content = torch.load(checkpoint, weights_only=True)
    content["moe_peft"]["config"]["init_args"]["backbone"]["init_args"]["name"] = str(tmp_path / "gone")
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"gone' cannot be read .* give a local folder"):
        load_module(checkpoint)
    module = load_module(checkpoint, backbone=str(moved))
    own = trained(backbones["causal"], "LoRA")
    assert torch.equal(output(module, random_batch()), output(own, random_batch()))


def test_another_backbone_is_refused(backbones, checkpoint, tmp_path):  # noqa: F811
    import transformers

    other = shutil.copytree(backbones["causal"], tmp_path / "other")
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    model.lm_head.weight.data.add_(1.0)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="checkpoint of another fingerprint"):
        load_module(checkpoint, backbone=str(other))
