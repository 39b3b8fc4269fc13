"""Routers without a gradient in a fit: what they sum, what stays frozen meanwhile, and what comes out of it."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel

from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.checkpoint import read_checkpoint
from moe_peft.cli import run
from moe_peft.embedders import HiddenStates
from moe_peft.layers.closed_form_router import PrototypeRouter, RidgeRouter
from moe_peft.optim import LearningRates
from tests.callbacks.stages_worker import STEPS, SWITCH, TASK_IDS, run_stages
from tests.callbacks.tiny_stages import EPOCH, fit, moved, scripted, weights
from tests.methods.tiny_tt import blank, rows_for
from tests.tiny_fits import assert_reproduced, retest
from tests.tiny_runs import metrics, one_error, recorded, world  # noqa: F401  (a fixture)

ROUTERS = {"prototype": PrototypeRouter, "ridge": RidgeRouter}
BOTH = pytest.mark.parametrize("router", ROUTERS)


def sums_of(features, own, experts):
    """What a router must have seen: the numbers of rows and their sums [E, d], row by row, in fp64."""
    normal = functional.layer_norm(features.float(), features.shape[-1:]).double()
    counts, sums = torch.zeros(experts).double(), torch.zeros(experts, features.shape[1]).double()
    for row, expert in zip(normal, own.tolist(), strict=True):
        counts[expert] += 1
        sums[expert] += row
    return counts, sums, normal


def assert_sums(state, features, own, tolerance=1e-12):
    """The router's buffers against those of the given rows."""
    counts, sums, normal = sums_of(features, own, len(state["counts"]))
    assert torch.equal(state["counts"], counts)
    if "gram" in state:
        design = functional.pad(normal, (0, 1), value=1.0)
        sums = torch.cat([sums, counts[:, None]], 1)
        torch.testing.assert_close(state["gram"], design.T @ design, rtol=0, atol=tolerance * len(own))
    torch.testing.assert_close(state["sums"], sums, rtol=0, atol=tolerance * len(own))


def seen(kind, batches):
    """Features and tasks of the rows of some micro-batches of `fit`, read by another module."""
    reader = blank(kind, features=HiddenStates(None, "auto"))
    rows = [rows_for(kind, 6, batch % EPOCH) for batch in batches]
    return torch.cat([reader.prompt_features(batch) for batch in rows]), torch.cat([batch["task_id"] for batch in rows])


# ---- the stages ------------------------------------------------------------------------------------------------------

SGD = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1)}
CASES = {
    "plain": ("ridge", {}, {}),
    "prototype": ("prototype", {}, {"gradient_clip_val": 0.05}),
    "momentum": ("ridge", SGD, {"gradient_clip_val": 0.05}),
    "clipped by value": ("ridge", {}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
    "bf16": ("ridge", {}, {"precision": "bf16-mixed", "gradient_clip_val": 0.05}),
    "accumulation": ("ridge", {}, {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("case", CASES)
def test_stage_two_sums_its_own_rows_and_moves_nothing(tmp_path, kind, case):
    """Six micro-batches of stage one, ten of stage two; decay is on."""
    router, options, trainer = CASES[case]
    module = scripted(kind, router=ROUTERS[router](), **options)
    start, steps = weights(module), 6 // trainer.get("accumulate_grad_batches", 1)
    made, watch = fit(module, tmp_path, FreezeThenRoute(steps, keep_best=False), **trainer)
    assert moved(start, watch.after[5]) == ({"adapters", "heads"} if kind == "classifier" else {"adapters"})
    assert moved(watch.after[5], weights(module)) == set() and len(watch.losses) == 16
    assert min(watch.losses[:6]) > 0 and watch.losses[6:] == [0.0] * 10
    assert made.callback_metrics["train/loss"] == 0 and module.router_trained
    assert_sums(module.router.state_dict(), *seen(kind, range(6, 16)))


@BOTH
def test_side_by_side_every_row_of_the_fit_is_summed(tmp_path, router):
    module = scripted(router=ROUTERS[router]())
    start = weights(module)
    _, watch = fit(module, tmp_path, None, epochs=2)
    assert moved(start, watch.after[0]) == moved(watch.after[0], watch.after[-1]) == {"adapters"}
    assert min(watch.losses) > 0 and module.router_trained
    assert_sums(module.router.state_dict(), *seen("causal", range(8)))


@BOTH
def test_a_rate_of_a_group_that_there_is_not_does_nothing_as_for_every_method(router):
    module = blank("classifier", router=ROUTERS[router](), lr=LearningRates(routers=0.5), scheduler=None)
    groups = module.configure_optimizers().param_groups
    assert [group["name"] for group in groups] == ["adapters", "heads"] and {group["lr"] for group in groups} == {1e-3}


@pytest.mark.slow
def test_two_processes_sum_what_one_does(tmp_path):
    (one,), pair = run_stages(1, tmp_path, "ridge"), run_stages(2, tmp_path, "ridge")
    rows = (STEPS - SWITCH) * len(TASK_IDS)
    assert one["router"]["counts"].tolist() == [rows / 2, rows / 4, rows / 4]
    for process in pair:
        assert moved(process["after"][SWITCH], process["after"][-1]) == set()
        for name, value in one["router"].items():
            torch.testing.assert_close(process["router"][name], value, rtol=0, atol=1e-12 * value.abs().max().item())
            assert torch.equal(process["router"][name], pair[0]["router"][name]), "the processes differ"


# ---- commands --------------------------------------------------------------------------------------------------------


def configured(world, router, *tasks, kind="causal"):  # noqa: F811
    """Two epochs of six steps, one of each stage."""
    config = world.config(tasks or ("tone", "next"), kind, "TTLoRAMoE")
    arguments = {"ridge": 0.5} if router == "ridge" else {"normalise": True}
    config["model"]["init_args"]["router"] = {"class_path": ROUTERS[router].__name__, "init_args": arguments}
    return config


def state(folder, name="last"):
    checkpoint = read_checkpoint(folder / f"checkpoints/{name}.ckpt")["state_dict"]
    return {name.removeprefix("router."): value for name, value in checkpoint.items() if name.startswith("router.")}


@pytest.fixture(scope="module", params=ROUTERS)
def whole(request, world, tmp_path_factory):  # noqa: F811
    """A whole fit: its run folder, configuration, and command line."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    cli = world.fit(folder, configured(world, request.param))
    return folder, lambda: configured(world, request.param), cli


def test_the_sums_are_those_of_the_rows_of_stage_two_as_the_bare_model_reads_them(world, whole):  # noqa: F811
    folder, _, cli = whole
    prompts = {row.row_id: row.prompt for row in cli.datamodule.rows("train")}
    rows = [name for line in recorded(folder)[6:] for name in line["rows"]]
    assert len(rows) == 6 * 8 and {name.split("/")[0] for name in rows} == {"tone", "next"}
    bare = AutoModel.from_pretrained(world.backbones["causal"]).eval()
    with torch.no_grad():
        last = torch.cat([bare(torch.tensor([prompts[name]])).last_hidden_state[:, -1] for name in rows])
    own = torch.tensor([["tone", "next"].index(name.split("/")[0]) for name in rows])
    assert_sums(state(folder), last, own, tolerance=1e-5)


def test_a_tested_run_gives_its_own_numbers_again(whole):
    folder, _, cli = whole
    assert getattr(cli.model.router, "ridge", 0.5) == 0.5
    ((step, accuracy),) = metrics(folder, "val/router/accuracy")
    assert step == 11 and float(accuracy) == 1, "stage two routes, stage one does not"
    run(retest(folder))
    assert_reproduced(folder)


@BOTH
def test_rows_go_where_the_sums_say(router):
    module, batch = blank(router=ROUTERS[router]()).train(), rows_for()
    module.method_loss_terms(batch)
    assert torch.equal(module.eval().routed_tasks(batch), batch["task_id"])
    for name in module.router.per_expert:
        module.router.get_buffer(name).copy_(module.router.get_buffer(name).roll(1, 0))
    assert torch.equal(module.routed_tasks(batch), (batch["task_id"] + 1) % 3)


def test_a_fit_killed_in_stage_two_goes_on_to_the_bit(world, whole, tmp_path):  # noqa: F811
    (there, config, _), folder = whole, tmp_path / "run"
    killed = config()
    killed["trainer"]["callbacks"][-1]["init_args"] = {"stop_at": 10}
    often = "--checkpoint.every_n_train_steps=4"
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, killed, often)
    assert state(folder)["counts"].sum() == 2 * 8
    world.fit(folder, config(), "--ckpt_path=last", often)
    one, other = state(folder), state(there)
    assert one["counts"].sum() == 6 * 8
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_straight_through_needs_a_gradient(world, tmp_path, capsys):  # noqa: F811
    config = configured(world, "ridge")
    config["model"]["init_args"]["straight_through"] = True
    file = world.write(tmp_path / "wrong.yaml", config)
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}/run")
    assert "straight_through: a RidgeRouter learns by no gradient; use LinearRouter" in line
