"""A checkpoint on other tasks than its own: rows by name, the nearest known task, the mean row. Tiny models."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from moe_peft.backbones import Backbone
from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.data.tasks import TaskSpec
from moe_peft.layers.representation import cosines, represent
from moe_peft.methods.evaluation import predict_rows
from moe_peft.methods.more import MoRE
from moe_peft.methods.nearest_task import nearest_task
from tests.tiny import batch_of, come_alive, output, random_batch, tiny_backbone

CHOICES = {"a": ("no", "yes"), "b": ("x", "y", "z"), "c": ("1", "2", "3", "4"), "new": ("up", "down")}
FORMS = {"own": {}, "shared": {"embedding_dim": 6}}
KINDS = ("causal", "seq2seq", "classifier")


def make(names: str, kind: str = "causal", **arguments) -> MoRE:
    """A MoRE on a tiny backbone with the tasks of these names."""
    tasks = [TaskSpec(name, "classification", "accuracy", "{text}", CHOICES[name]) for name in names.split()]
    module = MoRE(backbone=fixed_backbone(kind), tasks=tasks, rank=4, **arguments)
    module.configure_model()
    return module


def fixed_backbone(kind: str) -> Backbone:
    """A tiny backbone that is the same model every time, whatever was drawn before."""
    backbone = tiny_backbone(kind)
    load = backbone.load

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return load()

    backbone.load = seeded  # type: ignore[method-assign]
    return backbone


def trained(kind: str = "causal", representation: Any = "mean", **arguments) -> MoRE:
    """A MoRE of the tasks a, b and c, alive, whose tasks choose different ranks."""
    module = come_alive(make("a b c", kind, **arguments), random_batch(6, kind)).eval()
    assert any(len(set(ranks)) > 1 for ranks in module.rank_table().values())
    module.representation = representation
    return module


def loaded(old: MoRE, names: str, kind: str = "causal", **arguments) -> MoRE:
    """A module of other tasks that took the checkpoint of `old`, as a Trainer loads it."""
    checkpoint = {"state_dict": {name: value.clone() for name, value in old.state_dict().items()}}
    old.on_save_checkpoint(checkpoint)
    module = make(names, kind, **arguments)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def of_task(batch: Any, task: int) -> Any:
    """The same rows as rows of one task."""
    return {**batch, "task_id": torch.full_like(batch["task_id"], task)}


@torch.no_grad()
def answers(module: MoRE, batch: Any) -> torch.Tensor:
    """What a model gives for a batch: hidden states, and the losses, which go through the heads where there are any."""
    return torch.cat([output(module, batch).flatten(), module(batch)])


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for rounding (heads of other tasks change the width of a matrix product)."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def routed(module: MoRE, batch: Any) -> list[int]:
    """The table rows that the routers see."""
    module.begin(batch)
    found = module.context.get("task_id", len(batch["task_id"]))
    assert found is not None
    return found.tolist()


# ---- rows by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unknown_task", ["nearest", "mean"])
def test_known_tasks_are_matched_by_name_in_another_order_and_with_one_missing(kind, form, unknown_task):
    old = trained(kind, **FORMS[form])
    new = loaded(old, "c a", kind, unknown_task=unknown_task, **FORMS[form])
    batch = random_batch(4, kind, seed=9)
    found = [answers(new, of_task(batch, task)) for task in (0, 1)]
    same(found[0], answers(old, of_task(batch, 2)))
    same(found[1], answers(old, of_task(batch, 0)))
    assert (found[0] - found[1]).abs().max() > 1e-2
    table, before = (module.rank_table() for module in (new, old))
    assert table == {slot: [ranks[2], ranks[0]] for slot, ranks in before.items()}
    start, before = (module.rank_table(start=True) for module in (new, old))
    assert start == {slot: [ranks[2], ranks[0]] for slot, ranks in before.items()}


@pytest.mark.parametrize("selector", ["random", "fixed"])
def test_the_untrained_selectors_keep_their_tasks_ranks(selector):
    old = make("a b c", selector=selector).eval()
    slot = next(iter(old.selectors()))
    old.selectors()[slot].start.copy_(torch.tensor([0, 1, 2]))
    new = loaded(old, "c new a", unknown_task="nearest", selector=selector)
    assert [new.rank_table()[slot][task] for task in (0, 2)] == [3, 1]


def test_a_run_that_knows_all_tasks_may_come_after_one_that_did_not():
    old = trained()
    new = loaded(old, "new c", unknown_task="mean")
    again = {"state_dict": new.state_dict()}
    new.on_save_checkpoint(again)
    again["moe_peft"]["tasks"] = ["new", "c"]
    again["state_dict"] = make("new c").adapter_state()
    new.on_load_checkpoint(again)
    new.load_state_dict(again["state_dict"])
    assert new.unknown.tasks == [] and new.unknown.row_names == ["new", "c"]


@pytest.mark.parametrize("names", ["c b a", "a b", "a b c new"])
def test_other_tasks_are_refused_by_default(names):
    with pytest.raises(ValueError, match=r"^checkpoint of another tasks: it has \['a', 'b', 'c'\], this run .*order$"):
        loaded(trained(), names)


def test_a_resumed_fit_must_have_the_checkpoints_tasks_whatever_the_option():
    checkpoint, module = {"state_dict": {}}, make("c a", unknown_task="nearest")
    trained().on_save_checkpoint(checkpoint)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(ValueError, match="checkpoint of another tasks"):
        module.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_table_form_is_refused_in_one_line():
    with pytest.raises(ValueError, match="lacks 1 tensors, first 'task_embedding.weight'"):
        loaded(trained(), "c new", unknown_task="mean", embedding_dim=6)


def test_a_head_of_other_classes_is_refused(monkeypatch):
    old = trained("classifier")
    monkeypatch.setitem(CHOICES, "c", ("4", "3", "2", "1"))
    with pytest.raises(ValueError, match=r"task 'c' is classification of \['4'.*give the same classes"):
        loaded(old, "c a", "classifier", unknown_task="nearest")


def test_a_task_without_a_trained_head_is_refused():
    with pytest.raises(ValueError, match="task 'new' is unknown to the checkpoint, which has no head for it"):
        loaded(trained("classifier"), "a new", "classifier", unknown_task="nearest")


# ---- the mean row ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_an_unknown_task_gets_the_mean_of_the_known_rows(form):
    old = trained(**FORMS[form])
    new = loaded(old, "new b", unknown_task="mean", **FORMS[form])
    batch = random_batch(4, seed=9)
    found, without_task = answers(new, of_task(batch, 0)), answers(new, of_task(batch, -1))
    known = [answers(old, of_task(batch, task)) for task in range(3)]
    for name, table in old.named_parameters():
        if name.endswith("embedding.weight"):
            table.data[0] = table.data.mean(0)
    same(found, answers(old, of_task(batch, 0)))
    same(found, without_task)
    assert all((found - other).abs().max() > 1e-2 for other in known)
    new.predictions = {"model": []}
    assert new.routing_notes() == {"new": "unknown to the checkpoint, routed by the mean embedding"}
    new.merge("new")
    torch.testing.assert_close(answers(new, of_task(batch, 0)), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selector", ["fixed", "random"])
def test_a_mean_row_means_nothing_without_a_gate(selector):
    with pytest.raises(ValueError, match=f"unknown_task: selector '{selector}' has no gate"):
        make("a b", selector=selector, unknown_task="mean")


# ---- the nearest task -----------------------------------------------------------------------------------------------


def voted(old: MoRE, kind: str, prompt: list[int], how: Any) -> int:
    """The majority vote for one prompt by hand: a fresh bare model, one row without padding."""
    model: Any = old.backbone.load()
    part, ids = model.get_encoder() if kind == "seq2seq" else model, torch.tensor([prompt])
    votes, mask = [], torch.ones(1, len(prompt), dtype=torch.int64)
    names = {id(linear): name for name, linear in model.named_modules() if name in old.adapted}
    for linear in part.modules():
        if isinstance(linear, nn.Linear) and id(linear) in names:
            table = old.selectors()[names[id(linear)]].task_embeddings().detach()

            def vote(_, args, table=table):
                votes.append(int(cosines(represent(args[0], mask, how), table).argmax()))

            linear.register_forward_pre_hook(vote)
    with torch.no_grad():
        part(input_ids=ids, attention_mask=mask)
    assert len(votes) == {"causal": 14, "seq2seq": 12, "classifier": 12}[kind]
    return max(range(3), key=lambda task: (votes.count(task), -task))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["mean", "last_token", "first_token"])
def test_the_vote_is_what_a_bare_model_says_prompt_by_prompt(kind, form, how):
    old, batch = trained(kind, **FORMS[form]), random_batch(12, kind, seed=15)
    prompts = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["prompt_mask"], strict=True)]
    wanted = [voted(old, kind, prompt, how) for prompt in prompts]
    tables = {slot: selector.task_embeddings() for slot, selector in old.selectors().items()}
    assert nearest_task(old, batch, tables, how).tolist() == wanted  # type: ignore[arg-type]
    assert len(set(wanted)) > 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_rows_of_an_unknown_task_are_adapted_as_their_nearest_known_one(kind, form):
    old, batch = trained(kind, **FORMS[form]), random_batch(8, kind, seed=11)
    new = loaded(old, "b new", kind, unknown_task="nearest", **FORMS[form])
    tables = {slot: selector.task_embeddings() for slot, selector in old.selectors().items()}
    wanted = nearest_task(old, batch, tables, "mean")
    rows = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1])
    mixed = {**batch, "task_id": rows}
    expected = {**batch, "task_id": torch.where(rows == 1, wanted, 1)}
    assert len(set(wanted.tolist())) > 1
    same(answers(new, mixed), answers(old, expected))
    assert routed(new, mixed) == routed(new, {**mixed, "task_id": torch.where(rows == 1, -1, rows)})


def test_untrained_embeddings_route_too():
    old = make("a b c", selector="random").eval()
    old.representation = "mean"
    new = loaded(old, "new", unknown_task="nearest", selector="random")
    assert set(routed(new, of_task(random_batch(), 0))) <= {1, 2, 3}


@pytest.mark.parametrize("packed", [False, True])
def test_answers_take_no_part_and_all_options_of_a_row_go_one_way(packed):
    old = trained(representation="last_token")
    new = loaded(old, "new", unknown_task="nearest")
    prompts = [[5, 6, 7, 8, 9], [40, 41], [60, 61, 62], [33, 11, 90, 2, 7, 21]]
    wanted = routed(new, of_task(batch_of(prompts, [[] for _ in prompts]), 0))
    options = [[3, 4], [80], [50, 51, 52]]
    if packed:
        batch = batch_of(prompts, [sum(options, []) for _ in prompts])
    else:
        batch = batch_of([p for p in prompts for _ in options], [option for _ in prompts for option in options])
        wanted = [row for row in wanted for _ in options]
    assert routed(new, of_task(batch, 0)) == wanted
    assert len(set(wanted)) > 1


def test_a_tie_goes_to_the_checkpoints_first_task():
    old = trained(targets=["q_proj"])
    new = loaded(old, "c new", unknown_task="nearest", targets=["q_proj"])
    first, second = (selector.embedding.weight for selector in new.selectors().values())
    inputs = {}
    for layer in new.adapted.values():
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer.slot: args[0].mean((0, 1))}))
    batch = of_task(batch_of([[5, 6, 7, 8]], [[]]), 1)
    with new.context.disabled(), torch.no_grad():
        output(new, batch)
    x, y = inputs.values()
    # Rows: c, new, a, b. One linear votes for c, the other for b.
    first.data.copy_(torch.stack([x, -x, -x, -x]))
    second.data.copy_(torch.stack([-y, -y, -y, y]))
    assert routed(new, batch) == [3]


def test_no_linear_that_sees_the_prompt():
    old = trained("seq2seq", targets=r"decoder.*\.(wi|wo)")
    new = loaded(old, "new", "seq2seq", unknown_task="nearest", targets=r"decoder.*\.(wi|wo)")
    with pytest.raises(ValueError, match="needs an adapted linear that sees the prompt"):
        new.begin(of_task(random_batch(4, "seq2seq"), 0))


def test_the_bare_base_asks_nobody():
    new = loaded(trained(), "new", unknown_task="nearest")
    batch = of_task(random_batch(), 0)
    with new.context.disabled():
        assert routed(new, batch) == [0] * 4


def test_the_vote_leaves_no_trace_in_the_module():
    new = loaded(trained(), "b new", unknown_task="nearest")
    known, unknown = of_task(random_batch(), 0), of_task(random_batch(seed=8), 1)
    before = answers(new, known)
    answers(new, unknown)
    assert torch.equal(answers(new, known), before)
    assert not any(layer._forward_pre_hooks for layer in new.adapted.values())


def test_an_unknown_task_cannot_be_merged_row_by_row():
    new = loaded(trained(), "b new", unknown_task="nearest")
    with pytest.raises(ValueError, match="'new' is unknown to the checkpoint and routed row by row"):
        new.merge("new")
    new.merge("b")


def test_a_checkpoint_without_contrast_warns():
    with pytest.warns(UserWarning, match="trained without TaskContrast"):
        loaded(trained(representation=None), "new", unknown_task="nearest")


def test_the_contrast_leaves_its_representation():
    module = make("a b")
    TaskContrast(representation="last_token").on_fit_start(None, module)  # type: ignore[arg-type]
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other = make("a b")
    other.on_load_checkpoint(checkpoint)
    assert make("a b").representation is None and other.representation == "last_token"


# ---- task ids and summaries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unknown_task", "training", "task"),
    [("error", False, -1), ("nearest", True, -1), ("mean", False, -2), ("mean", False, 2)],
)
def test_task_ids_that_there_are_not(unknown_task, training, task):
    module = make("a b", unknown_task=unknown_task).train(training)
    with pytest.raises(ValueError, match=rf"task_id: {task} is no task; the 2 tasks are 0..1"):
        module.begin(of_task(random_batch(), task))


def test_predictions_say_how_an_unknown_tasks_rows_were_routed():
    old = trained()
    new = loaded(old, "b new", unknown_task="nearest")
    rows = [{"choices": ["up", "down"], "label": 0}] * 4
    prompts = [[5, 6, 7, 8, 9], [40, 41], [60, 61, 62], [33, 11, 90, 2, 7, 21]]
    batch = batch_of([p for p in prompts for _ in "12"], [[3], [4]] * 4)
    found = predict_rows(new, of_task({**batch, "rows": rows}, 1))
    names = [new.task_of_row(row) for row in routed(new, of_task(batch, 1))[::2]]
    assert [row.routing for row in found] == [{f"as_task/{name}": 1.0} for name in names]
    new.predictions = {"model": found}
    note = new.routing_notes()["new"]
    assert note.startswith("unknown to the checkpoint, routed as ")
    assert all(f"{name} ({names.count(name) / 4:.0%})" in note for name in names)
    assert all(row.routing is None for row in predict_rows(new, of_task({**batch, "rows": rows}, 0)))
