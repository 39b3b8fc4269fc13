"""Few-shot transfer and unknown tasks through the command line, on saved tiny models."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_peft.cli import run
from moe_peft.runs import load_module
from tests.tiny import randomise
from tests.tiny_runs import MOODS, RECORDER, World, one_error, recorded, results, world  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
OLD = ("tone", "next", "stars")


def config(world: World, tasks, kind: str = "causal", epochs: int = 1, callbacks=(), **arguments):  # noqa: F811
    """A MoRE configuration; weight decay is on, so that a parameter that only seems frozen moves."""
    made = world.config(tasks, kind)
    given = made["model"]["init_args"]
    kept = {name: given[name] for name in ("backbone", "max_new_tokens")}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}}
    rest = {"optimizer": optimizer, "rank": 4, "scaling": "paper", **arguments}
    made["model"] = {"class_path": "MoRE", "init_args": {**kept, **rest}}
    made["trainer"] |= {"max_epochs": epochs, "callbacks": [*callbacks, {"class_path": RECORDER}]}
    return made


def transfer(source: Path, **arguments):
    """The callback's section."""
    return {"class_path": "TransferFrom", "init_args": {"checkpoint": str(source)} | arguments}


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint, or of a checkpoint."""
    file = folder / "checkpoints" / "last.ckpt" if folder.is_dir() else folder
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def old(world, tmp_path_factory):  # noqa: F811
    """A run with TaskContrast on three tasks whose checkpoint has random, far apart values; treat as read-only."""
    return fitted(world, tmp_path_factory.mktemp("old") / "run")


@pytest.fixture(scope="module")
def old_classifier(world, tmp_path_factory):  # noqa: F811
    """The same on a classifier backbone."""
    return fitted(world, tmp_path_factory.mktemp("old") / "run", "classifier", ("tone", "mood", "stars"))


def fitted(world: World, folder: Path, kind: str = "causal", tasks=OLD) -> Path:  # noqa: F811
    contrast = {"class_path": "TaskContrast", "init_args": {"representation": "last_token"}}
    world.fit(folder, config(world, tasks, kind, callbacks=[contrast]))
    for name in ("best", "last"):
        file = folder / "checkpoints" / f"{name}.ckpt"
        content, module = torch.load(file, weights_only=True), load_module(file)
        randomise(module, scale=0.1)
        content["state_dict"] = module.adapter_state()
        torch.save(content, file)
    return folder


def rows_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The task embeddings."""
    return {name: value for name, value in tensors.items() if name.endswith("embedding.weight")}


def frozen_fit(world, folder, old, tasks, **arguments):  # noqa: F811
    """A transfer whose checkpoint is what was taken over: every learning rate is zero, so no step changes anything."""
    rates = dict.fromkeys(("adapters", "routers", "heads"), 0.0)
    kind = "classifier" if "heads.linear.bias" in state(old) else "causal"
    made = config(world, tasks, kind, callbacks=[transfer(old, **arguments)], lr=rates)
    world.fit(folder, made)
    return state(folder)


# ---- what is taken over ---------------------------------------------------------------------------------------------


def test_known_rows_come_by_name_a_new_one_is_the_mean_and_the_rest_stays(world, old, tmp_path):  # noqa: F811
    before, after = state(old), frozen_fit(world, tmp_path / "run", old, ("stars", "mood", "tone"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name in rows_of(before):
            torch.testing.assert_close(after[name], torch.stack([value[2], value.mean(0), value[0]]))
            assert (value[2] - value[0]).abs().max() > 1e-2
        elif name.endswith(".start"):
            assert torch.equal(after[name][[0, 2]], value[[2, 0]])
        else:
            assert torch.equal(after[name], value), name
    # The paper's scaling ρ / T, as the old run's three tasks made it.
    assert after["model.model.layers.0.mlp.up_proj.router.experts"].max() == pytest.approx(4 / 3)


def test_fewer_tasks_drop_the_other_rows_also_of_a_shared_table(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "old", config(world, OLD, embedding_dim=5))
    made = config(world, ("next",), embedding_dim=5, callbacks=[transfer(tmp_path / "old")], lr={"routers": 0.0})
    world.fit(tmp_path / "run", made)
    before, after = state(tmp_path / "old"), state(tmp_path / "run")
    # best.ckpt is taken where a folder is given; one epoch makes best and last the same.
    assert torch.equal(after["task_embedding.weight"], before["task_embedding.weight"][1:2])


def test_a_new_task_takes_the_row_that_its_prompts_vote_for(world, old, tmp_path, caplog):  # noqa: F811
    with caplog.at_level("INFO"):
        after = frozen_fit(world, tmp_path / "run", old, ("mood", "tone"), new_row="nearest")
    log = caplog.text
    chosen = re.search(r"new task mood starts with the row of (\w+)", log)
    votes = re.search(r"prompts of mood are nearest to: (\w+) (\d+)", log)
    assert chosen and votes and chosen[1] == votes[1] and int(votes[2]) > 12
    at = OLD.index(chosen[1])
    for name, table in rows_of(state(old)).items():
        assert torch.equal(after[name], table[[at, 0]])


def test_heads_come_by_name_and_a_new_one_is_fresh(world, old_classifier, tmp_path):  # noqa: F811
    before = state(old_classifier)
    plus = world.task(tmp_path / "plus", "tone")
    (plus / "task.json").write_text((plus / "task.json").read_text().replace("tone", "plus"))
    after = frozen_fit(world, tmp_path / "run", old_classifier, [world.tasks["stars"], plus, world.tasks["mood"]])
    for name in ("heads.linear.weight", "heads.linear.bias"):
        # Old outputs: tone 0-1, mood 2-4, stars 5; new: stars 0, plus 1-2, mood 3-5.
        assert torch.equal(after[name][0], before[name][5]) and torch.equal(after[name][3:], before[name][2:5])
        fresh = after[name][1:3]
        assert not any(torch.equal(row, other) for row in fresh for other in before[name])


def test_the_same_tasks_just_go_on(world, old, tmp_path):  # noqa: F811
    before, after = state(old), frozen_fit(world, tmp_path / "run", old, OLD)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", ["LoRA", "TRex"])
def test_a_method_without_task_rows_moves_on_too(world, tmp_path, method):  # noqa: F811
    def made(tasks, callbacks=(), **arguments):
        found = world.config(tasks)
        given, trainer = found["model"]["init_args"], found["trainer"]
        if method == "LoRA":
            found["model"]["class_path"] = "LoRA"
            del given["r1"], given["r2"], trainer["callbacks"][0]
        given |= arguments
        trainer["callbacks"] += callbacks
        trainer["max_epochs"] = 1
        return found

    world.fit(tmp_path / "old", made(("tone",)))
    still = {"lr": dict.fromkeys(("adapters", "routers", "gates"), 0.0)}
    world.fit(tmp_path / "run", made(("mood",), [transfer(tmp_path / "old")], **still))
    before, after = state(tmp_path / "old"), state(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(value.abs().max() > 0 for name, value in before.items() if ".factors." in name)


# ---- what learns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "selector", "row"])
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(world, old, tmp_path, train):  # noqa: F811
    world.fit(tmp_path / "run", config(world, ("mood", "tone"), callbacks=[transfer(old, train=train)]))
    before, after = state(old), state(tmp_path / "run")
    for name, value in before.items():
        kind = "factors" if ".factors." in name else "gates" if name.endswith(("router.weight", "router.bias")) else ""
        still = kind in {"all": (), "selector": ("factors",), "row": ("factors", "gates")}[train]
        if kind:
            assert torch.equal(after[name], value) == still, name
    moved = [not torch.equal(after[name][1], value[0]) for name, value in rows_of(before).items()]
    assert all(moved)
    learned = results(tmp_path / "run" / "results.json")["trainable_parameters"]
    parts = {"row": ("embedding.weight",), "selector": ("embedding.weight", "router.weight", "router.bias")}.get(train)
    counted = [v.numel() for name, v in after.items() if not name.endswith(("start", "experts"))]
    if parts:
        counted = [v.numel() for name, v in after.items() if name.endswith(parts)]
    assert learned == sum(counted)


def test_heads_learn_beside_the_selector(world, old_classifier, tmp_path):  # noqa: F811
    callbacks = [transfer(old_classifier, train="selector")]
    world.fit(tmp_path / "run", config(world, ("mood",), "classifier", callbacks=callbacks))
    before, after = state(old_classifier), state(tmp_path / "run")
    assert not torch.equal(after["heads.linear.weight"], before["heads.linear.weight"][2:5])
    factors = [name for name in before if ".factors." in name]
    assert factors and all(torch.equal(after[name], before[name]) for name in factors)


# ---- an ordinary run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "selector"])
def test_a_killed_transfer_goes_on_without_transferring_again(world, old, tmp_path, train):  # noqa: F811
    source = shutil.copytree(old, tmp_path / "source")
    callbacks = [{"class_path": "TaskContrast"}, transfer(source, train=train)]
    made = config(world, ("mood", "tone"), callbacks=callbacks, epochs=2, dropout=0.1)
    world.fit(tmp_path / "whole", made)
    made["trainer"]["callbacks"][-1]["init_args"] = {"stop_at": 8}
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(tmp_path / "run", made)
    shutil.rmtree(source)
    del made["trainer"]["callbacks"][-1]["init_args"]
    world.fit(tmp_path / "run", made, "--ckpt_path=last")
    assert recorded(tmp_path / "run")[8:] == recorded(tmp_path / "whole")[6:]
    whole = state(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in state(tmp_path / "run").items())


def test_the_checkpoint_is_an_ordinary_one(world, old, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", config(world, ("mood", "tone"), callbacks=[transfer(old)]))
    plain = world.write(tmp_path / "plain.yaml", config(world, ("mood", "tone")))
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    run(["test", f"--config={plain}", f"--ckpt_path={best}", f"--trainer.default_root_dir={tmp_path / 'test'}"])
    fitted, tested = tmp_path / "run" / "results.json", tmp_path / "test" / "results.test-best.json"
    assert results(fitted)["rows"] == results(tested)["rows"]
    # Its own configuration still names the callback, which a test leaves alone: the source may be gone.
    own = tmp_path / "run" / "config.yaml"
    own.write_text(own.read_text().replace(str(old), str(tmp_path / "gone")))
    run(["test", f"--config={own}", f"--ckpt_path={best}"])
    assert results(fitted)["rows"] == results(tmp_path / "run" / "results.test-best.json")["rows"]
    assert [spec.name for spec in load_module(tmp_path / "run").specs] == ["mood", "tone"]


def test_two_processes_freeze_and_learn_alike(world, old, tmp_path):  # noqa: F811
    made = config(world, ("mood", "tone"), callbacks=[transfer(old, train="selector", new_row="nearest")])
    made["trainer"] |= {"devices": 2, "strategy": "ddp"}
    file = world.write(tmp_path / "run.yaml", made)
    command = ["-m", "moe_peft", "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = state(old), state(tmp_path / "run")
    factors = [name for name in before if ".factors." in name]
    assert factors and all(torch.equal(after[name], before[name]) for name in factors)
    assert all(not torch.equal(after[name][1], value[0]) for name, value in rows_of(before).items())


# ---- unknown tasks at test ------------------------------------------------------------------------------------------


def on_other_tasks(world, old, tmp_path, command, tasks, unknown_task):  # noqa: F811
    """`test` or `predict` of the old checkpoint on other tasks, with nothing but the run's own arguments changed."""
    folders = json.dumps([str(world.tasks[task]) for task in tasks])
    best, folder = old / "checkpoints" / "best.ckpt", tmp_path / command
    arguments = [f"--config={old}/config.yaml", f"--data.init_args.tasks={folders}", f"--ckpt_path={best}"]
    more = [f"--model.init_args.unknown_task={unknown_task}", f"--trainer.default_root_dir={folder}"]
    return [command, *arguments, *more], folder


@pytest.mark.parametrize("unknown_task", ["nearest", "mean"])
def test_an_old_checkpoint_answers_new_tasks_of_every_kind(world, old, tmp_path, unknown_task):  # noqa: F811
    tasks = ("count", "tone", "mood")
    arguments, folder = on_other_tasks(world, old, tmp_path, "test", tasks, unknown_task)
    run([*arguments, "--results.save_predictions=true"])
    lines = [json.loads(line) for line in (folder / "predictions.test-best.jsonl").read_text().splitlines()]
    known = [line for line in lines if line["task_name"] == "tone"]
    whole = [json.loads(line) for line in fitted_predictions(old, tmp_path)]
    assert [line["scores"] for line in known] == [line["scores"] for line in whole if line["task_name"] == "tone"]
    page = (folder / "results.test-best.md").read_text()
    if unknown_task == "mean":
        assert "unknown to the checkpoint, routed by the mean embedding: count, mood." in page
        return
    for task in ("count", "mood"):
        chosen = [next(iter(line["routing"])).removeprefix("as_task/") for line in lines if line["task_name"] == task]
        assert len(chosen) == 9 and set(chosen) <= set(OLD)
        assert f"{max(chosen, key=chosen.count)} ({chosen.count(max(chosen, key=chosen.count)) / 9:.0%})" in page
    assert all(line["routing"] is None for line in known)


def fitted_predictions(old, tmp_path):
    """The old checkpoint's predictions on its own tasks."""
    run(["test", f"--config={old}/config.yaml", f"--ckpt_path={old}/checkpoints/best.ckpt",
         f"--trainer.default_root_dir={tmp_path / 'own'}"])  # fmt: skip
    return (tmp_path / "own" / "predictions.test-best.jsonl").read_text().splitlines()


def test_packed_and_single_options_are_routed_alike(world, old, tmp_path, monkeypatch):  # noqa: F811
    from moe_peft.backbones import Backbone

    routing = []
    for packs in (True, False):
        monkeypatch.setattr(Backbone, "packs_options", lambda self, length, packs=packs: packs)
        arguments, folder = on_other_tasks(world, old, tmp_path / str(packs), "predict", ("mood",), "nearest")
        run(arguments)
        lines = [json.loads(line) for line in (folder / "predictions.best.jsonl").read_text().splitlines()]
        assert all(len(line["scores"]) == len(MOODS) for line in lines)
        routing.append([[name for name in line["routing"] if name.startswith("as_task/")] for line in lines])
    assert routing[0] == routing[1] and all(len(names) == 1 for names in routing[0])


def test_validation_logs_the_shares(world, old, tmp_path, capsys):  # noqa: F811
    arguments, _ = on_other_tasks(world, old, tmp_path, "validate", ("mood",), "nearest")
    found = run(arguments)
    shares = {name: float(v) for name, v in found.trainer.callback_metrics.items() if name.startswith("val/unknown/")}
    assert shares and sum(shares.values()) == pytest.approx(1)
    assert all(name.split("/")[2] == "mood" and name.split("/")[3] in OLD for name in shares)


def test_an_unknown_tasks_head_and_an_unasked_one_are_one_line(world, old, old_classifier, tmp_path, capsys):  # noqa: F811
    arguments, _ = on_other_tasks(world, old_classifier, tmp_path, "test", ("tone", "mood"), "nearest")
    run(arguments)
    arguments, _ = on_other_tasks(world, old, tmp_path, "test", ("next", "tone"), "error")
    assert "checkpoint of another tasks" in one_error(capsys, *arguments)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"checkpoint": "nowhere"}, "TransferFrom: checkpoint: 'nowhere' is no file; give a checkpoint"),
        ({"rank": 3}, {}, "TransferFrom: model.rank is 3 here and 4 in the checkpoint"),
        ({"alpha": 8.0}, {}, "TransferFrom: model.alpha is 8.0 here and 32.0 in the checkpoint"),
        ({"scaling": "none"}, {}, "TransferFrom: model.scaling is 'none' here and 'paper' in the checkpoint"),
        (
            {"targets": ["q_proj"]},
            {},
            "TransferFrom: model.targets is ['q_proj'] here and 'all-linear'",
        ),
        ({"selector": "random"}, {}, "TransferFrom: model.selector is 'random' here"),
        ({"selector": "random"}, {"train": "selector"}, "TransferFrom: train 'selector' needs rank selectors that"),
        ({"class_path": "LoRA"}, {}, "checkpoint of another method: it has 'MoRE', this run 'LoRA'"),
        ({"class_path": "LoRA"}, {"train": "row"}, "TransferFrom: train 'row' needs rank selectors that learn"),
        ({"class_path": "TTLoRAMoE"}, {}, "TransferFrom: a TTLoRAMoE's experts belong to their tasks"),
        ({"kind": "seq2seq"}, {}, "checkpoint of another fingerprint"),
    ],
)
def test_bad_transfers_are_one_line(world, old, tmp_path, capsys, change, arguments, message):  # noqa: F811
    made = config(world, ("mood",), change.get("kind", "causal"), callbacks=[transfer(old, **arguments)])
    made["model"]["class_path"] = change.get("class_path", "MoRE")
    if "class_path" in change:
        del made["model"]["init_args"]["scaling"]
    made["model"]["init_args"] |= {name: value for name, value in change.items() if name not in ("kind", "class_path")}
    file = world.write(tmp_path / "run.yaml", made)
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert message in line
    assert not (tmp_path / "run" / "config.yaml").exists()
