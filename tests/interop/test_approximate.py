"""Static LoRAs of routings that depend on the input: what they are the mean of, and what is said of their error."""

import json
import re
import shutil

import pytest
import torch

from moe_peft.batch import IGNORE_INDEX
from moe_peft.interop.approximate import calibrate, held, mean_cores, reads_input
from moe_peft.interop.export import export, unfaithful
from moe_peft.interop.origin import origin_of
from moe_peft.interop.rating import rate
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.runs import load_module
from tests.tiny import bare_logits, build, logits, random_batch, randomise
from tests.tiny_checkpoints import save
from tests.tiny_runs import metrics, world  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):  # noqa: F811
    """The run of a T-REX on two tasks; treat as read-only."""
    folder = tmp_path_factory.mktemp("approximate") / "fitted"
    world.fit(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(fitted):
    """The same, its routers far from uniform; treat as read-only."""
    folder = shutil.copytree(fitted, fitted.with_name("run"))
    module = load_module(folder)
    randomise(module)
    save(module, folder / "checkpoints" / "best.ckpt")
    return folder


@pytest.fixture
def module(run_folder):
    return load_module(run_folder)


@pytest.fixture(scope="module")
def origin(run_folder):
    return origin_of(run_folder, ["tone", "next"])


def variant(module, **options):
    """Another T-REX with random routers, on the same base and data."""
    given = {"r1": 2, "r2": 3, "use_prior": False} | options
    other = TRex(backbone=module.backbone, tasks=module.specs, **given)
    other.configure_model()
    randomise(other)
    return other.eval()


@pytest.mark.parametrize(
    "options",
    [None, {}, {"top_k": 2}, {"factorised_router": True}, {"mode": "rank1", "r1": 4, "r2": 4}],
    ids=str,
)
@torch.no_grad()
def test_the_cores_are_means_over_the_real_tokens(module, origin, options):
    module = module if options is None else variant(module, **options)
    rows = origin.rows("train", None, 7)
    found = mean_cores(module, origin, rows)
    module.context.recording = True
    totals, count = dict.fromkeys(found, 0.0), 0
    for row in rows:  # one by one: no padding
        module(origin.data.collator.train([row], 1.0, 1.0))
        count += len(row.prompt) + len(row.answer)
        for slot in found:
            totals[slot] += module.context.records[slot].weights.sum((0, 1))
    module.context.recording = False
    assert found.keys() == module.adapted.keys() and len(rows) == 14
    for slot, core in found.items():
        mean = module.adapted[slot].router.gates()[1] * totals[slot] / count
        expected = mean if module.rank1 else mean.unflatten(-1, (module.r1, module.r2)).mT
        torch.testing.assert_close(core, expected, rtol=1e-4, atol=1e-6)
        assert core.std() > 1e-2


@pytest.mark.parametrize("mode", ["mix_and_match", "rank1"])
@torch.no_grad()
def test_held_cores_are_one_matrix_per_linear_and_leave_no_trace(module, mode):
    module = variant(module, mode=mode, r1=3, r2=3)
    batch = random_batch()
    batch["input_ids"] %= module.backbone.config().vocab_size
    routed, generator = logits(module, batch), torch.Generator().manual_seed(0)
    size = (3,) if mode == "rank1" else (3, 3)
    cores = {slot: torch.randn(size, generator=generator) for slot in module.adapted}
    with held(module, cores):
        assert not reads_input(module)
        static = logits(module, batch)
    assert reads_input(module) and torch.equal(logits(module, batch), routed)
    for slot, layer in module.adapted.items():
        layer.merge(cores[slot])
    merged = logits(module, batch)
    assert (static - routed).abs().max() > 1e-3
    torch.testing.assert_close(static, merged, rtol=0, atol=1e-4)


def test_rating_is_zero_where_the_routing_is_uniform(module, origin):
    uniform = variant(module, router_init="zeros")
    for layer in uniform.adapted.values():
        layer.router.weight.data.zero_()
    (static,) = calibrate(uniform, origin, "task", ["tone"], 100)
    found = rate(uniform, static, origin.data)
    assert found.logits < 1e-5 and found.losses["static"] == pytest.approx(found.losses["routed"], rel=1e-6)
    assert found.losses["base"] != pytest.approx(found.losses["routed"], rel=1e-3)


def test_the_routed_side_is_what_the_fit_validated(fitted):
    own, data = load_module(fitted), origin_of(fitted, ["tone", "next"])
    best = max(float(value) for _, value in metrics(fitted, "val/mean"))
    steps = [step for step, value in metrics(fitted, "val/mean") if float(value) == best]
    value = next(float(value) for step, value in metrics(fitted, "val/next/accuracy") if step == steps[0])
    (static,) = calibrate(own, data, "task", ["next"], 100)
    found = rate(own, static, data.data)
    assert found.rows == 5 and found.scores["routed"].tasks["next"].value == pytest.approx(value)
    loss = torch.cat([own(data.data.collator.train([row], 1.0, 1.0)) for row in static.held_out]).mean().item()
    assert found.losses["routed"] == pytest.approx(loss, rel=1e-5)


@torch.no_grad()
def test_the_logits_distance_is_relative_to_what_the_adapter_changes(module, origin):
    (static,) = calibrate(module, origin, "task", ["tone"], 100)
    found = rate(module, static, origin.data)
    apart, whole = 0.0, 0.0
    for row in static.held_out:
        batch = origin.data.collator.train([row], 1.0, 1.0)
        at = (batch["labels"] != IGNORE_INDEX).roll(-1, 1)
        own, bare = logits(module, batch)[at], bare_logits(module, batch)[at]
        with held(module, static.cores):
            fixed = logits(module, batch)[at]
        apart, whole = apart + (fixed - own).square().sum(), whole + (bare - own).square().sum()
    assert found.logits == pytest.approx((apart / whole).sqrt().item(), rel=1e-4)
    assert 0.01 < found.logits


def test_the_rows_are_training_rows_and_others_are_held_out(module, origin):
    tone, following = calibrate(module, origin, "task", ["tone", "next"], 6)
    names = [{row.row_id.split("/")[0] for row in (*each.calibrated, *each.held_out)} for each in (tone, following)]
    assert names == [{"tone"}, {"next"}] and len(tone.calibrated) == 6 and len(tone.held_out) == 5
    trained = {row.row_id for row in origin.data.rows("train")}
    assert trained >= {row.row_id for row in tone.calibrated} and not trained & {row.row_id for row in tone.held_out}
    assert any((tone.cores[slot] - following.cores[slot]).abs().max() > 1e-3 for slot in tone.cores)


def test_clusters_are_those_of_the_prior(module, origin):
    statics = calibrate(module, origin, "cluster", [], 12)
    assert sum(len(each.calibrated) for each in statics) == 24 and len(statics) > 1
    for each in statics:
        for row in each.calibrated + each.held_out:
            (batch,) = origin.data.prompts([row])
            assert each.name == f"cluster-{module.prior.assign(module.prior.embedder(batch)).item()}"


# ---- the export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_an_approximate_export_is_faithful_to_its_cores_and_says_what_it_is(module, origin, tmp_path, to):
    exports = export(module, to, "all", tmp_path / "out", origin=origin, approximate="task", rows=9)
    assert unfaithful(exports) is None and [each.task for each in exports] == ["tone", "next"]
    for each in exports:
        assert each.parity.difference < 1e-4 and "5 rows of validation data" in each.how
        line = re.search(
            rf"approximate: the mean of the routing over 9 training rows \(9 of {each.task}\); on 5 validation rows, "
            r"logits off by \d+\.\d% of what the adapter changes, loss static \d\.\d+, routed \d\.\d+, base \d\.\d+ "
            r"\([+-]\d+\.\d%\), accuracy static \S+ ±\S+, routed \S+ ±\S+, base \S+ ±",
            str(each),
        )
        assert line and line[0] in (each.folder / "README.md").read_text()
        assert "an approximation" in (each.folder / "README.md").read_text()
    assert module.prior is not None and reads_input(module)


def test_clusters_get_a_folder_each_with_the_tasks_in_them(module, origin, tmp_path):
    exports = export(module, "peft", None, tmp_path / "out", origin=origin, approximate="cluster", rows=12)
    assert unfaithful(exports) is None and len(exports) > 1
    for each in exports:
        assert each.folder.name == each.task and each.task.startswith("cluster-")
        assert json.loads((each.folder / "rank_table.json").read_text())["task"] == each.task
        assert re.search(r"training rows \((\d+ of (tone|next)(, )?)+\); (on \d+|no) validation rows", str(each))


def test_a_cluster_without_rows_held_out_is_not_rated(module, origin):
    statics = calibrate(module, origin, "task", ["tone"], 3)
    assert rate(module, statics[0]._replace(held_out=[]), origin.data) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"to": "peft"},
            r"^to: TRex cannot be merged or exported as a LoRA: .*; use --approximate task \(or cluster\)",
        ),
        ({"to": "merged"}, "^to: TRex cannot be merged"),
        ({"to": "adapter", "task": None, "approximate": "task"}, "^approximate: an adapter is exact; leave it out"),
        ({"to": "peft", "approximate": "cluster"}, "^task: a cluster holds rows of all tasks; leave task 'tone' out"),
        (
            {"to": "peft", "task": None, "approximate": "task"},
            "^task: peft is written of one task; name one of tone, next",
        ),
        ({"to": "peft", "rows": 5}, "^rows: 5 is of no use; give 1 or more, with approximate"),
        ({"to": "peft", "approximate": "task", "rows": 0}, "^rows: 0 is of no use"),
        (
            {"to": "peft", "approximate": "task", "origin": None},
            r"^the run's rows are out of reach \(no run is known\);",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(module, origin, tmp_path, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        export(module, **{"task": "tone", "out": tmp_path / "out", "origin": origin} | given)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_a_place_that_is_taken_is_refused_before_the_calibration(module, origin, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr("moe_peft.interop.export.calibrate", lambda *_: pytest.fail("it calibrated"))
    with pytest.raises(ValueError, match=f"^out: '{tmp_path}' exists and is not an empty folder"):
        export(module, "peft", "tone", tmp_path, origin=origin, approximate="task")


@pytest.mark.parametrize("method", [LoRA, MoRE])
def test_what_is_exact_is_not_approximated(tmp_path, origin, method):
    with pytest.raises(ValueError, match=f"^approximate: a {method.__name__} is exported exactly; leave it out$"):
        export(build(method), "peft", "tone", tmp_path / "out", origin=origin, approximate="task")


def test_clusters_need_a_fitted_prior(module, origin):
    with pytest.raises(ValueError, match="^approximate: this TRex has no clusters, which a fitted semantic prior has"):
        calibrate(variant(module), origin, "cluster", [], 5)


@pytest.mark.parametrize("kind", ["seq2seq", "classifier"])
def test_other_kinds_of_backbones_are_calibrated_and_rated_too(world, tmp_path, kind):  # noqa: F811
    config = world.config(("tone", "mood"), kind)
    config["trainer"]["max_epochs"] = 1
    world.fit(tmp_path / "run", config)
    module, data = load_module(tmp_path / "run"), origin_of(tmp_path / "run", ["tone", "mood"])
    randomise(module, scale=0.2)
    (done,) = export(module, "peft", "mood", tmp_path / "out", origin=data, approximate="task", rows=9)
    assert done.parity.difference < 1e-4 and ("base" in done.approximation) == (kind == "seq2seq")
    assert re.search(r"loss static \d\.\d+, routed \d\.\d+.* \([+-]\d+\.\d%\), accuracy static \S+", done.approximation)
    if kind == "classifier":
        assert (tmp_path / "out" / "head.json").is_file()
        with pytest.raises(
            ValueError, match="^approximate: rows of a cluster belong to several tasks, each with a head"
        ):
            export(module, "peft", None, tmp_path / "other", origin=data, approximate="cluster")
