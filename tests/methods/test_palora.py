"""PaLoRA: LoRAs of tasks, blended by a preference."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.layers.task_routers import PREFERENCE
from moe_peft.methods.lora import LoRA
from moe_peft.methods.palora import PaLoRA
from moe_peft.methods.preferences import AnnealedDirichlet, AnnealedLattice
from tests.methods.tiny_tasks import agrees, alive_layer, by_row, gradients, task_batch
from tests.tiny import TASKS, build, come_alive, logits, random_batch

OPTIONS = {"rank": 2, "alpha": 4.0}
HALF = {"tone": 0.25, "topic": 0.75}


class Always(AnnealedDirichlet):
    """Draws what it is told to."""

    def __init__(self, *shares):
        super().__init__()
        self.shares = torch.tensor(shares)

    def draw(self, tasks, step, progress):
        return self.shares


def updates(layer):
    """The matrix of every task."""
    a, b = layer.factors.A.unflatten(0, (2, -1)), layer.factors.B.unflatten(1, (2, -1))
    return [4 / 2 * b[:, task] @ a[task] for task in range(2)]


def test_rows_are_served_by_their_own_tasks_lora():
    _, layer, x, tasks = alive_layer(PaLoRA, **OPTIONS)
    agrees(layer, x, by_row(lambda task: updates(layer)[task], x, tasks))


def test_a_preference_blends_the_loras_whatever_the_task():
    _, layer, x, tasks = alive_layer(PaLoRA, preference=HALF, **OPTIONS)
    first, second = updates(layer)
    agrees(layer, x, by_row(lambda task: 0.25 * first + 0.75 * second, x, tasks))


def test_a_preference_needs_no_tasks():
    batch = random_batch()
    module = come_alive(build(PaLoRA, preference=HALF, **OPTIONS), batch).eval()
    with torch.no_grad():
        expected = logits(module, batch)
        del batch["task_id"]
        assert torch.equal(logits(module, batch), expected)
    module.prefer(None)
    with pytest.raises(ValueError, match="^PaLoRA routes by task: the batch has no task_id"):
        module.begin(batch)


def test_a_merged_preference_is_the_blend_for_all_tasks():
    batch = random_batch()
    module = come_alive(build(PaLoRA, **OPTIONS), batch).eval()
    with torch.no_grad():
        module.prefer(HALF)
        expected = logits(module, batch)
        module.merge()
        torch.testing.assert_close(logits(module, batch), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="^preference: the model is merged for another one"):
            module.prefer(None)
        module.unmerge()
        module.prefer({"topic": 1.0})
        assert (logits(module, batch) - expected).abs().max() > 1e-2
        one = logits(module, batch)
        module.prefer(None)
        assert torch.equal(logits(module, batch | {"task_id": torch.ones_like(batch["task_id"])}), one)
    with pytest.raises(ValueError, match="^task: PaLoRA adapts each task in its own way; name one of tone, topic$"):
        module.merge()


def test_one_task_is_a_lora():
    batch = task_batch(0)
    module = come_alive(build(PaLoRA, tasks=TASKS[:1], **OPTIONS), batch)
    lora = build(LoRA, tasks=TASKS[:1], **OPTIONS)
    for slot, layer in module.adapted.items():
        lora.adapted[slot].factors.load_state_dict(layer.factors.state_dict())
    assert gradients(module, batch).keys() == gradients(lora, batch).keys()
    torch.testing.assert_close(gradients(module, batch), gradients(lora, batch), rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_weighed_sum_of_the_tasks_means():
    batch = random_batch() | {"task_id": torch.tensor([0, 0, 1, 0]), "task_share": torch.tensor([3.0, 3.0, 1.0, 3.0])}
    module = come_alive(build(PaLoRA, sampler=Always(0.25, 0.75), **OPTIONS), batch).train()
    module.begin(batch)
    loss = module.step_losses(batch)["task_loss"]
    rows = module.row_loss
    torch.testing.assert_close(loss, 0.25 * rows[[0, 1, 3]].mean() + 0.75 * rows[2])
    module.eval().prefer(HALF)
    torch.testing.assert_close(module(batch), rows, rtol=1e-4, atol=1e-4)


def test_at_a_corner_nothing_reaches_the_other_loras():
    module = come_alive(build(PaLoRA, **OPTIONS), random_batch(), scale=0.2).train()
    module.sampler = Always(0.0, 1.0)
    for name, gradient in gradients(module, random_batch()).items():
        dimension = 0 if name.endswith("A") else 1
        other, own = gradient.chunk(2, dimension)
        assert other.abs().max() == 0 < own.abs().max(), name


# ---- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "tasks"), [(AnnealedDirichlet, 13), (AnnealedLattice, 2), (AnnealedLattice, 3)])
def test_draws_lie_on_the_simplex_and_depend_on_seed_and_step(sampler, tasks, monkeypatch):
    drawn = [sampler(seed=3).draw(tasks, step, 0.4) for step in range(20)]
    for one in drawn:
        assert one.shape == (tasks,) and one.min() >= 0
        torch.testing.assert_close(one.sum(), torch.tensor(1.0))
    assert torch.equal(drawn[5], sampler(seed=3).draw(tasks, 5, 0.4))
    assert not torch.equal(drawn[5], drawn[6]) or not torch.equal(drawn[6], drawn[7])
    assert any(not torch.equal(one, sampler(seed=4).draw(tasks, step, 0.4)) for step, one in enumerate(drawn))
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert torch.equal(drawn[5], sampler().draw(tasks, 5, 0.4))


def test_dirichlet_goes_from_the_whole_simplex_to_its_corners():
    start, end = (
        torch.stack([AnnealedDirichlet().draw(3, step, progress) for step in range(400)]) for progress in (0.0, 1.0)
    )
    torch.testing.assert_close(start.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.05)
    torch.testing.assert_close(start.amax(1).mean(), torch.tensor(11 / 18), rtol=0, atol=0.05)  # uniform: (1+1/2+1/3)/3
    assert (end.amax(1) > 0.99).float().mean() > 0.95
    assert torch.bincount(end.argmax(1)).min() > 80


def test_the_lattice_goes_from_the_centre_to_the_corners():
    sampler = AnnealedLattice(divisions=4)
    points = {tuple(sampler.draw(3, step, 0.2).mul(4).round(decimals=4).tolist()) for step in range(300)}
    assert points == {(float(i), float(j), float(4 - i - j)) for i in range(5) for j in range(5 - i)}
    for step in range(10):
        torch.testing.assert_close(sampler.draw(3, step, 0.0), torch.full((3,), 1 / 3))
        power = sampler.draw(2, step, 0.2) ** 5  # of the point itself
        torch.testing.assert_close(sampler.draw(2, step, 1.0), power / power.sum())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_fit_draws_once_for_each_step(accumulation):
    seen, progress = [], []

    class Watched(AnnealedDirichlet):
        def draw(self, tasks, step, progress_):
            progress.append(progress_)
            return super().draw(tasks, step, progress_)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            shares = module.context.get(PREFERENCE, 4)
            assert torch.equal(shares, shares[:1].expand_as(shares))
            seen.append(shares[0])

    module = build(PaLoRA, sampler=Watched(seed=1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **OPTIONS)
    batches = DataLoader([random_batch(seed=step) for step in range(4 * accumulation)], batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=1, accumulate_grad_batches=accumulation, callbacks=[Watch()], **quiet).fit(module, batches)
    assert progress == [step / 4 for step in range(4) for _ in range(accumulation)]
    expected = [AnnealedDirichlet(seed=1).draw(2, step, step / 4) for step in range(4) for _ in range(accumulation)]
    assert torch.equal(torch.stack(seen), torch.stack(expected))


def test_a_fit_of_unknown_length_is_refused():
    module = build(PaLoRA, scheduler=None, **OPTIONS)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=-1, max_time="00:00:01:00", **quiet)
    with pytest.raises(ValueError, match=r"^sampler: preferences are annealed over all steps[^\n]*$"):
        trainer.fit(module, DataLoader([random_batch()], batch_size=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preference": {"mood": 1.0}}, "^preference: there is no task 'mood'; use some of tone, topic$"),
        ({"preference": {"tone": 0.5}}, "^preference: the shares sum to 0.5; make them sum to 1$"),
        ({"preference": {"tone": -0.5, "topic": 1.5}}, "^preference: the share -0.5 of 'tone' is not between 0 and 1$"),
        ({"loss_mean": "row"}, "^loss_mean: 'row' has no loss per task for λ to weigh; leave it out$"),
        ({"tasks": TASKS[:1], "sampler": AnnealedLattice()}, "^sampler: AnnealedLattice is for 2 or 3 tasks, not 1; "),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(PaLoRA, **OPTIONS | arguments)


@pytest.mark.parametrize("arguments", [{"divisions": 0}, {"sharpness": 0.0}, {"seed": -1}])
def test_wrong_arguments_of_a_sampler_are_named(arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}: "):
        AnnealedLattice(**arguments)
