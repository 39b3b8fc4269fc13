"""TT-LoRA MoE in use: checkpoints, commands, generation, merging, precision, and what it refuses."""

import subprocess
import sys

import pytest
import torch

from moe_peft.cli import run
from moe_peft.layers.expert_router import LinearRouter
from tests.methods.ddp_worker import ROOT
from tests.methods.tiny_more import agree
from tests.methods.tiny_tt import KINDS, TASKS, alone, blank, moe, rows_for, send, take, with_tasks
from tests.tiny import batch_of, output, randomise, tiny_backbone
from tests.tiny_runs import one_error, results, world  # noqa: F401  (a fixture)

# ---- 19: checkpoints -------------------------------------------------------------------------------------------------


def restored(checkpoint, kind):
    """A fresh module, in eval mode and filled with other numbers, after it took over a checkpoint."""
    module = blank(kind)
    randomise(module, seed=9)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def saved(kind):
    """A trained module in fp32 and its checkpoint."""
    module = blank(kind).eval()
    randomise(module)
    module.router_trained.fill_(True)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return module, checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_19_a_restored_checkpoint_routes_and_answers_the_same(kind):
    (module, checkpoint), batch = saved(kind), rows_for(kind, 12)
    again = restored(checkpoint, kind)
    assert torch.equal(output(again, batch), output(module, batch))
    assert torch.equal(again.scores(batch), module.scores(batch)) and again.routes
    assert not torch.equal(again.scores(batch).argmax(-1), batch["task_id"])
    assert not any(name.startswith("model.") and ".factors." not in name for name in checkpoint["state_dict"])


READER = """
import sys, torch
from tests.methods.test_tt_lora_moe_running import restored
from tests.methods.tiny_tt import rows_for
from tests.tiny import output
module = restored(torch.load(sys.argv[1], weights_only=True), "classifier")
torch.save(output(module, rows_for("classifier")).detach(), sys.argv[2])
"""


@pytest.mark.slow
def test_19_a_new_process_answers_the_same(tmp_path):
    module, checkpoint = saved("classifier")
    torch.save(checkpoint, tmp_path / "last.ckpt")
    command = [sys.executable, "-c", READER, str(tmp_path / "last.ckpt"), str(tmp_path / "output.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "output.pt"), output(module, rows_for("classifier")))


@pytest.mark.parametrize("tasks", [TASKS[::-1], TASKS[:2]], ids=["order", "fewer"])
def test_a_checkpoint_of_other_tasks_is_refused(tasks):
    _, checkpoint = saved("causal")
    with pytest.raises(ValueError, match="^checkpoint of another tasks.*configure the same tasks in the same order$"):
        blank(tasks=tasks).on_load_checkpoint(checkpoint)


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_tests_to_its_own_numbers_and_with_an_oracle(world, tmp_path, kind):  # noqa: F811
    folder = tmp_path / "run"
    world.fit(folder, world.config(("tone", "mood"), kind, "TTLoRAMoE"))
    again = ["test", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/best.ckpt"]
    run(again)
    assert results(folder / "results.test-best.json")["rows"] == results(folder / "results.json")["rows"]
    assert (folder / "predictions.test-best.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()
    cli = run([*again, "--model.init_args.routing=oracle"])
    assert cli.model.routing == "oracle" and not cli.model.routes and cli.model.router_trained


def test_a_batch_size_that_does_not_divide_gives_one_line(world, tmp_path, capsys):  # noqa: F811
    config = world.config(("tone", "next", "mood"), method="TTLoRAMoE")
    config["data"]["init_args"]["sampling"] = {"class_path": "moe_peft.data.sampling.EqualRows"}
    file = world.write(tmp_path / "wrong.yaml", config)
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}/run")
    assert "batch_size=8 cannot hold equally many rows of 3 tasks; use 6 or 9" in line


# ---- what else a method does -----------------------------------------------------------------------------------------


def generate(module, batch, **options):
    module.begin(batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ids = module.model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )
    return ids[:, -6:].tolist()


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_generates_what_each_rows_expert_generates_alone(kind, beams):
    module = moe(kind, scale=0.6)
    prompts, experts = [[5, 6, 7, 8], [9, 10, 11, 12, 13], [5, 6, 7, 8], [20, 21]], [2, 0, 1, 2]
    batch = batch_of(prompts, [[]] * 4, "classifier", "left" if kind == "causal" else "right")
    batch = with_tasks(batch, 0, 0, 1, 1)
    send(module, *experts)
    together = generate(module, batch, num_beams=beams)
    for row, expert in enumerate(experts):
        assert [together[row]] == generate(alone(module, expert), with_tasks(take(batch, row), 0), num_beams=beams)
    assert together[0] != together[2], "the same prompt under two experts"


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_task_answers_as_its_expert_and_unmerges_to_the_bit(kind):
    module, batch = moe(kind), with_tasks(rows_for(kind), *[1] * 6)
    before = output(module, batch)
    module.merge(1)
    agree(output(module, batch), output(alone(module, 1), with_tasks(batch, *[0] * 6)))
    with pytest.raises(ValueError, match="rows of task 'task2' while task 'task1' is merged"):
        module(rows_for(kind) | {"task_id": torch.full((6,), 2)})
    module.unmerge()
    assert torch.equal(output(module, batch), before)


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        module = moe(
            backbone=tiny_backbone(gradient_checkpointing=checkpointing),
            straight_through=True,
            router=LinearRouter(noise=False),
        )
        batch = rows_for()
        module.train().begin(batch)
        sum(module.step_losses(batch).values()).backward()
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_a_validation_between_steps_sees_what_was_learned(fused):
    """Fused optimizers write past the counters by which kept, folded experts are known to be old."""
    module, batch = blank(), rows_for()
    randomise(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        module.eval()
        with torch.no_grad():
            output(module, batch)
        module.train().begin(batch)
        sum(module.step_losses(batch).values()).backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        kept = output(module, batch)
    torch.testing.assert_close(kept, output(module, batch).detach(), rtol=0, atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize("routing", ["auto", "oracle"])
def test_a_task_that_there_is_not_is_refused(wrong, routing):
    module, batch = moe(routing=routing), rows_for()
    batch["task_id"] = torch.tensor([0, 1, 2, wrong, 1, 2])
    with pytest.raises(ValueError, match=rf"^task_id: {wrong} is no task; the 3 tasks are 0\.\.2$"):
        module(batch)


def test_a_router_that_never_learned_is_not_asked():
    module = moe(routing="learned", trained=False)
    with pytest.raises(ValueError, match="^routing: the router was never trained; train it first, or use routing: or"):
        module(rows_for())
    module.router_trained.fill_(True)
    module(rows_for())


@pytest.mark.parametrize("weight", [0, -1.0])
def test_a_router_without_a_loss_is_refused(weight):
    with pytest.raises(ValueError, match=f"^router_weight: {weight} leaves the router without a loss; give more than"):
        blank(router_weight=weight)
