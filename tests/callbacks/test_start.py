"""StartFrom through the command line: a fit that begins as somebody else's LoRA."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from moe_peft.interop.parity import apply_lora
from moe_peft.runs import load_module
from tests.conftest import ROOT
from tests.tiny import randomise
from tests.tiny_fits import lora
from tests.tiny_runs import one_error, recorded, world  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def theirs(world, tmp_path_factory):  # noqa: F811
    """A LoRA that PEFT wrote for the causal base; treat as read-only."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world.backbones["causal"])
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    randomise(model, scale=0.3)
    folder = tmp_path_factory.mktemp("theirs") / "lora"
    model.save_pretrained(folder)
    return folder


def started(world, folder, **arguments):  # noqa: F811
    """A LoRA configuration that begins with another one, by the callback's bare name."""
    made = lora(world.config())
    made["model"]["init_args"] |= {"rank": 4, "alpha": 5.0, "dropout": 0.0} | arguments
    made["trainer"]["callbacks"].insert(0, {"class_path": "StartFrom", "init_args": {"folder": str(folder)}})
    made["trainer"]["max_epochs"] = 1
    return made


def test_a_fit_that_learns_nothing_is_the_lora_itself(world, theirs, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO):
        world.fit(tmp_path / "run", started(world, theirs, lr={"adapters": 0.0}))
    assert f"start: the LoRA of '{theirs}', exactly; 10 linears that it lacks get no update" in caplog.text
    module = load_module(tmp_path / "run")
    ids = torch.tensor([[5, 9, 20, 7, 31]])
    with torch.no_grad():
        bare = module.backbone.load()(ids).logits
        expected = apply_lora(module.backbone.load(), theirs)(ids).logits
        found = module.model(ids).logits
    assert (expected - bare).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_resumed_fit_goes_on_and_does_not_start_again(world, theirs, tmp_path):  # noqa: F811
    made = started(world, theirs)
    made["trainer"]["max_epochs"] = 2
    world.fit(tmp_path / "whole", made)
    made["trainer"]["callbacks"][-1]["init_args"] = {"stop_at": 8}
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(tmp_path / "run", made)
    made["trainer"]["callbacks"][-1]["init_args"] = {}
    made["trainer"]["callbacks"][0]["init_args"]["folder"] = "gone"  # not even read
    world.fit(tmp_path / "run", made, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}")
    whole, parts = ({line["step"]: line["loss"] for line in recorded(tmp_path / name)} for name in ("whole", "run"))
    assert whole == parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2}, r"StartFrom: '.*lora' has rank 3 at \S+, LoRA here 2; give it rank 3 or more"),
        ({"targets": ["q_proj"]}, r"StartFrom: '.*lora' adapts \S+down_proj, which LoRA here does not; set targets"),
    ],
)
def test_what_does_not_fit_is_one_line(world, theirs, tmp_path, capsys, arguments, message):  # noqa: F811
    file = world.write(tmp_path / "bad.yaml", started(world, theirs, **arguments))
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert re.match(f"error: {message}", line), line


def test_a_folder_that_is_no_adapter_is_one_line(world, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    file = world.write(tmp_path / "bad.yaml", started(world, tmp_path / "empty"))
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert line.startswith("error: StartFrom: ") and "adapter_config.json' is no file" in line


@pytest.mark.slow
def test_shards_begin_as_one_process_does(world, theirs, tmp_path):  # noqa: F811
    """Two processes under FSDP2: a MoRE's shared task embeddings are a root of their own, and no forward has run."""
    made = world.config()
    still = {"lr": {"adapters": 0.0, "routers": 0.0}, "rank": 4, "embedding_dim": 5}
    kept = {name: made["model"]["init_args"][name] for name in ("backbone", "max_new_tokens", "optimizer")}
    made["model"] = {"class_path": "MoRE", "init_args": kept | still}
    made["trainer"] |= {"callbacks": started(world, theirs)["trainer"]["callbacks"][:1], "max_epochs": 1}
    file = world.write(tmp_path / "more.yaml", made)
    states = []
    for name, more in (("one", []), ("two", ["--trainer.strategy=fsdp2", "--trainer.devices=2"])):
        command = [sys.executable, "-m", "moe_peft", "fit", f"--config={file}", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        where = f"--trainer.default_root_dir={tmp_path / name}"
        subprocess.run([*command, where], check=True, env=environment, capture_output=True)
        states.append(torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    one, two = states
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    b = one["model.model.layers.0.mlp.down_proj.factors.B"]
    assert b.abs().max() > 0.1, "it did start from the LoRA"
