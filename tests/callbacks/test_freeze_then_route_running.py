"""Two stages in use: resumed in any of them, on two processes, and with the best checkpoint of stage two."""

import pytest
import torch

from moe_peft.callbacks.checkpoints import AdapterCheckpoint
from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.checkpoint import read_checkpoint
from moe_peft.layers.expert_router import LinearRouter
from moe_peft.reporting.run import Run
from tests.callbacks.stages_worker import STEPS, SWITCH, run_stages
from tests.callbacks.test_freeze_then_route import boundary, expert
from tests.callbacks.tiny_stages import fit, moved, scripted, weights
from tests.tiny_runs import metrics, one_error, recorded, results, world  # noqa: F401  (a fixture)


def state(folder, name="last"):
    return read_checkpoint(folder / f"checkpoints/{name}.ckpt")["state_dict"]


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["causal", "classifier"])
def whole(request, world, tmp_path_factory):  # noqa: F811
    """The run folder of an uninterrupted fit of two epochs with dropout, one of each stage, and its configuration."""
    tasks = ("tone", "mood") if request.param == "classifier" else ("tone", "next")
    folder = tmp_path_factory.mktemp("whole") / "run"
    world.fit(folder, world.config(tasks, request.param, "TTLoRAMoE"))
    return folder, lambda: world.config(tasks, request.param, "TTLoRAMoE")


@pytest.mark.parametrize("stop, saved", [(5, 4), (8, 6), (10, 8)], ids=["stage one", "at the switch", "stage two"])
def test_a_killed_fit_goes_on_to_the_bit(world, whole, tmp_path, stop, saved):  # noqa: F811
    (there, config), folder = whole, tmp_path / "run"
    killed = config()
    killed["trainer"]["callbacks"][-1]["init_args"] = {"stop_at": stop}
    often = [] if saved == 6 else ["--checkpoint.every_n_train_steps=4"]
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, killed, *often)
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == saved
    world.fit(folder, config(), "--ckpt_path=last", *often)
    lines = recorded(folder)
    assert lines[:stop] == recorded(there)[:stop]
    assert lines[stop:] == recorded(there)[saved:]
    for name in ("train/loss", "val/mean"):
        assert metrics(folder, name) == metrics(there, name) != []
    assert results(folder / "results.json")["rows"] == results(there / "results.json")["rows"]
    one, other = state(folder), state(there)
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Saving(AdapterCheckpoint):
    """Keeps the checkpoint of every validation."""

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


SCRIPT = [(0.1, 0.9, 0.5), (0.3, 0.2, 0.5), (0.2, 0.1, 0.4), (0.1, 0.9, 0.1), (1.0, 1.0, 1.0)]


def patient():
    """Best at validations 2, 1 and 1; the next two bring nothing, and stage one ends after 16 of at most 20 steps."""
    return scripted("classifier", *SCRIPT, router=LinearRouter(noise=False)), FreezeThenRoute(None, 5, patience=2)


@pytest.mark.parametrize("step", [4, 12, 16, 20], ids=["before a best", "while patient", "at the switch", "stage two"])
def test_best_experts_and_patience_survive_a_resume(tmp_path, step):
    module, stages = patient()
    _, watch = fit(module, tmp_path / "whole", stages, Saving(), epochs=6)
    assert boundary(watch) == 16
    again, stages = patient()
    again.validations = step // 4
    _, resumed = fit(again, tmp_path / "again", stages, epochs=6, resume=tmp_path / f"whole/{step}.ckpt")
    assert len(resumed.losses) == 24 - step and resumed.losses == watch.losses[step:]
    assert resumed.closed == watch.closed[step:] and resumed.rates == watch.rates[step:]
    assert moved(weights(again), weights(module)) == set()
    for task, validation in enumerate([1, 0, 0]):
        frozen = expert(weights(again), task)
        assert all(torch.equal(own, frozen[name]) for name, own in expert(watch.validated[validation], task).items())


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_one_of_stage_two(tmp_path):
    script = [(0.9, 0.9, 0.9), (0.8, 0.8, 0.8), (0.2, 0.2, 0.2), (0.3, 0.3, 0.3), (0.1, 0.1, 0.1)]
    saving = Saving()
    _, watch = fit(scripted("causal", *script), tmp_path, FreezeThenRoute(None, 2), saving, epochs=5)
    best = torch.load(saving.best_model_path, weights_only=True)
    assert saving.best_model_path.endswith("checkpoints/best.ckpt") and best["global_step"] == 16
    assert best["state_dict"]["router_trained"] and saving.best_model_score == pytest.approx(0.3)
    names = [name for name in best["state_dict"] if ".factors." in name]
    assert all(torch.equal(best["state_dict"][name], watch.validated[0][name]) for name in names)
    assert not torch.load(tmp_path / "8.ckpt", weights_only=True)["state_dict"]["router_trained"]


def test_a_whole_fit_tests_the_trained_router(whole):
    folder, _ = whole
    best, last = state(folder, "best"), state(folder)
    assert best["router_trained"] and last["router_trained"]
    assert read_checkpoint(folder / "checkpoints/best.ckpt")["global_step"] == 12
    monitored, history = Run(folder).results["validation"], [own.value for own in Run(folder).history("val/mean")]
    assert len(history) == 2 and monitored == {"name": "val/mean", "value": pytest.approx(history[1], rel=1e-5)}
    stage_one = {name for name in last if not name.startswith(("router", "features"))}
    assert stage_one and all(torch.equal(best[name], last[name]) for name in stage_one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts_epochs": 2}, "FreezeThenRoute: stage one ends at step 12 of 12, which leaves the router untrained"),
        ({}, "FreezeThenRoute: give experts_steps or experts_epochs"),
        ({"experts_steps": 3, "experts_epochs": 1}, "FreezeThenRoute: give experts_steps or experts_epochs"),
        ({"experts_epochs": 1, "patience": 0}, "FreezeThenRoute: patience is 0, it must be at least 1"),
    ],
)
def test_wrong_boundaries_give_one_line(world, tmp_path, capsys, given, message):  # noqa: F811
    config = world.config(method="TTLoRAMoE")
    config["trainer"]["callbacks"][0]["init_args"] = given
    file = world.write(tmp_path / "wrong.yaml", config)
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}/run")
    assert message in line


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_both_stages_as_one(tmp_path):
    (one,), (two, other) = run_stages(1, tmp_path), run_stages(2, tmp_path)
    assert len(one["losses"]) == STEPS
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=1e-5)
    for name, value in one["after"][-1].items():
        torch.testing.assert_close(two["after"][-1][name], value, rtol=0, atol=1e-5, msg=name)
    for run in (one, two, other):
        assert moved(run["start"], run["after"][SWITCH - 1]) == {"adapters", "heads"}
        assert moved(run["after"][SWITCH], run["after"][-1]) == {"routers"}
        for task, validation in enumerate([1, 0, 0]):
            own, frozen = expert(run["validated"][validation], task), expert(run["after"][-1], task)
            assert all(torch.equal(value, frozen[name]) for name, value in own.items())
    for step in range(STEPS):
        assert moved(two["after"][step], other["after"][step]) == set(), "the processes differ"
