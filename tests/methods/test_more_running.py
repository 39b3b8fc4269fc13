"""MoRE in use: its gate is alive, and frozen where it should be; checkpoints, resuming, processes, generation.

Property 6 of the method is the one that the official code fails: there no training step ever moves a rank, and after a
reload they move although nothing was learned.
"""

import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.checkpoint import read_checkpoint
from moe_peft.cli import run
from moe_peft.methods.more import MoRE
from moe_peft.optim import LearningRates
from tests.methods.ddp_worker import ROOT, assert_trained_as_one, run_processes
from tests.tiny import TASKS, batch_of, build, come_alive, logits, output, random_batch, randomise, tiny_backbone
from tests.tiny_runs import RECORDER, metrics, recorded, results, world  # noqa: F401  (a fixture)

KINDS = ["causal", "seq2seq", "classifier"]


def more(kind="causal", seed=0, **options):
    adam = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=3e-3), "scheduler": None}
    return build(MoRE, kind, seed, **{"rank": 8} | adam | options)


def fit(module, folder, *callbacks, steps=20):
    """Trains on the module's own kind of random batches, with a real Trainer; returns it."""
    kind = module.backbone.kind
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        **quiet,
    )
    batches = [random_batch(6, kind, seed) for seed in range(steps)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


def embeddings(module):
    return torch.cat(
        [selector.task_embeddings().detach().flatten() for selector in module.selectors().values()]
    ).clone()


def gates(module):
    return torch.cat([selector.weight.detach().flatten() for selector in module.selectors().values()]).clone()


# ---- 6: the gate is alive --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", ["full", "winner"])
def test_06_training_moves_ranks_without_any_contrast(tmp_path, kind, selector):
    module = more(kind, selector=selector)
    if selector == "winner":  # it leaves an expert that does harm, and only such a one: let some do harm
        for layer in module.adapted.values():
            torch.nn.init.normal_(layer.factors.B, std=0.3)
    before, gate = module.rank_table(), gates(module)
    assert before == module.rank_table(start=True) and module.diagnostics()["ranks/changed"] == 0
    fit(module, tmp_path)
    after = module.rank_table()
    assert (gates(module) - gate).abs().max() > 1e-3
    moved = sum(one != other for slot in before for one, other in zip(before[slot], after[slot], strict=True))
    assert moved > 0 and module.rank_table(start=True) == before
    assert module.diagnostics()["ranks/changed"] == pytest.approx(moved / (2 * len(before)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", [False, True])
def test_06_no_rank_moves_at_a_selectors_rate_of_zero(tmp_path, kind, contrast):
    module = more(kind, lr=LearningRates(routers=0.0))
    before, factors = module.rank_table(), next(iter(module.adapted.values())).factors.B.clone()
    fit(module, tmp_path, *([TaskContrast()] if contrast else []))
    assert not torch.equal(next(iter(module.adapted.values())).factors.B, factors)
    assert module.rank_table() == before


@pytest.mark.parametrize("kind", KINDS)
def test_06_no_rank_of_a_random_table_moves_though_the_contrast_moves_its_embeddings(tmp_path, kind):
    """Nor on a reload, where the official code asks its gate anew: the moved embeddings would give other ranks."""
    module = more(kind, selector="random")
    before, start = module.rank_table(), embeddings(module)
    trainer = fit(module, tmp_path, TaskContrast())
    assert (embeddings(module) - start).abs().max() > 0.05, "the embeddings did not move"
    assert module.rank_table() == before
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = restored(more(kind, selector="random"), tmp_path / "last.ckpt")
    assert torch.equal(embeddings(fresh), embeddings(module)) and fresh.rank_table() == before


def test_06_the_same_contrast_does_move_a_learned_tables_ranks(tmp_path):
    """Else the tests above could not fail."""
    module = more()
    before = module.rank_table()
    fit(module, tmp_path, TaskContrast())
    assert module.rank_table() != before


# ---- 13: checkpoints -------------------------------------------------------------------------------------------------


def restored(module, path):
    """Loads a checkpoint into a module whose own adapters are random."""
    randomise(module, seed=9)
    for selector in module.selectors().values():
        selector.start.fill_(0)
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module


FORMS = [
    {},
    {"selector": "winner", "scaling": "paper"},
    {"selector": "random"},
    {"selector": "fixed", "fixed_rank": [2, 5]},
    {"embedding_dim": 6, "scaling": "code"},
    {"experts": [1, 3, 8], "scaling": "none"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_13_a_restored_checkpoint_has_the_same_table_and_the_same_output(tmp_path, kind, options):
    module, batch = more(kind, **options), random_batch(kind=kind)
    fit(module, tmp_path, steps=6).save_checkpoint(tmp_path / "last.ckpt")
    fresh = restored(more(kind, **options), tmp_path / "last.ckpt")
    assert fresh.rank_table() == module.rank_table()
    assert fresh.rank_table(start=True) == module.rank_table(start=True)
    expected = output(module.eval(), batch)
    assert torch.equal(output(fresh.eval(), batch), expected)
    with module.context.disabled():
        assert (output(module, batch) - expected).abs().max() > 1e-4


READER = """
import sys, json, torch
from tests.methods.test_more_running import more, restored
from tests.tiny import output, random_batch
module = restored(more(), sys.argv[1]).eval()
torch.save(output(module, random_batch()).detach(), sys.argv[2])
print(json.dumps(module.rank_table()))
"""


@pytest.mark.slow
def test_13_a_new_process_finds_the_same_table_and_the_same_logits(tmp_path):
    module = more()
    fit(module, tmp_path, TaskContrast()).save_checkpoint(tmp_path / "last.ckpt")
    assert module.rank_table() != module.rank_table(start=True)
    command = [sys.executable, "-c", READER, str(tmp_path / "last.ckpt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == module.rank_table()
    assert torch.equal(torch.load(tmp_path / "logits.pt"), output(module.eval(), random_batch()))


@pytest.mark.parametrize("tasks", [TASKS[::-1], TASKS[:1], [*TASKS, TASKS[0]]], ids=["order", "fewer", "more"])
def test_a_checkpoint_of_another_task_list_is_refused(tmp_path, tasks):
    fit(more(), tmp_path, steps=1).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="checkpoint of another tasks.*configure the same tasks in the same order"):
        restored(more(tasks=tasks), tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4}, "another rank, number of experts"),
        ({"rank": 4}, "another rank"),
        ({"selector": "random"}, "has unexpected"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path, options, message):
    fit(more(), tmp_path, steps=1).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        restored(more(**options), tmp_path / "last.ckpt")
    assert "\n" not in str(error.value)


# ---- 15, 16: processes, resuming -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_15_two_processes_train_as_one(tmp_path):
    """With contrast and rank cost; each process sees rows of one of the two tasks only."""
    one, two = (run_processes(processes, tmp_path, "MoRE", "row") for processes in (1, 2))
    assert_trained_as_one(one, two, first=1e-4, later=1e-3)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):  # noqa: F811
    """The run folder of an uninterrupted fit of two epochs, with dropout and contrast."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    world.fit(folder, world.config(method="MoRE"))
    return folder


def test_a_run_logs_its_terms_and_its_ranks(whole):
    for name in ("train/task_loss", "train/contrast"):
        assert len(metrics(whole, name)) == 12
    for name in ("rank/tone", "rank/next", "ranks/mean", "ranks/changed", "ranks/distinct", "ranks/entropy"):
        assert len(metrics(whole, name)) == 2, name
    assert results(whole / "results.json")["method"] == "MoRE"


@pytest.mark.parametrize("stop, saved", [(8, 6), (5, 4)], ids=["after an epoch", "in the first epoch"])
def test_16_a_killed_fit_goes_on_to_the_bit(world, whole, tmp_path, stop, saved):  # noqa: F811
    folder, config = tmp_path / "run", world.config(method="MoRE")
    assert config["trainer"]["callbacks"][-1]["class_path"] == RECORDER
    config["trainer"]["callbacks"][-1]["init_args"] = {"stop_at": stop}
    often = [] if saved == 6 else ["--checkpoint.every_n_train_steps=4"]
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, config, *often)
    world.fit(folder, world.config(method="MoRE"), "--ckpt_path=last", *often)
    lines = recorded(folder)
    assert lines[:stop] == recorded(whole)[:stop]
    assert lines[stop:] == recorded(whole)[saved:]
    for name in ("train/loss", "train/contrast", "val/mean"):
        assert metrics(folder, name) == metrics(whole, name) != []
    assert results(folder / "results.json")["rows"] == results(whole / "results.json")["rows"]
    one, other = (read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"] for run in (folder, whole))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["seq2seq", "classifier"])
def test_a_run_tests_to_its_own_numbers(world, tmp_path, kind):  # noqa: F811
    folder, tasks = tmp_path / "run", ("tone", "mood", "stars")
    world.fit(folder, world.config(tasks, kind, "MoRE"))
    run(["test", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/best.ckpt"])
    assert results(folder / "results.test-best.json")["rows"] == results(folder / "results.json")["rows"]
    assert (folder / "predictions.test-best.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()


# ---- generation, precision -------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7, 8], [20, 21, 22]]
TASK_IDS = [0, 1, 1, 0]


def prompts(kind, which=range(4)):
    rows = [PROMPTS[i] for i in which]
    batch = batch_of(rows, [[]] * len(rows), "classifier", "left" if kind == "causal" else "right")
    return batch | {"task_id": torch.tensor([TASK_IDS[i] for i in which])}


def generate(module, batch, **options):
    module.begin(batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ids = module.model.generate(
        **inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, **options
    )
    return ids[:, -7:].tolist()


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_generates_what_each_row_generates_alone(kind, beams):
    module = come_alive(more(kind), random_batch(kind=kind), scale=1.0).eval()
    together = generate(module, prompts(kind), num_beams=beams)
    assert together == [generate(module, prompts(kind, [i]), num_beams=beams)[0] for i in range(4)]
    assert together[0] != together[2], "the same prompt under two tasks"
    assert generate(module, prompts(kind), num_beams=beams, use_cache=False) == together


def test_decoding_with_a_cache_gives_the_logits_of_the_full_forward():
    batch = prompts("causal")
    module = come_alive(more(), random_batch()).eval()
    answers = generate(module, batch)
    whole = batch_of(PROMPTS, answers) | {"task_id": batch["task_id"]}
    full = logits(module, whole)[:, -8:-1].detach()
    full[..., 2] = -torch.inf  # the end token is held back until seven tokens are there
    assert torch.equal(full.argmax(-1), torch.tensor(answers))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_low_precision_base_keeps_the_ranks_and_nearly_the_losses(kind, dtype):
    batch, found = random_batch(kind=kind), []
    for name in ("float32", dtype):
        backbone = tiny_backbone(kind)
        backbone.dtype = getattr(torch, name)
        module = more(kind, backbone=backbone)
        randomise(module, scale=0.1)
        assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
        losses = module(batch)
        losses.sum().backward()
        gradient = torch.cat([s.weight.grad.flatten() for s in module.selectors().values()])
        found.append((losses.detach(), module.rank_table(), gradient))
    (full, table, gradient), (low, low_table, low_gradient) = found
    assert low_table == table
    torch.testing.assert_close(low, full, rtol=0.02, atol=0.02)
    assert torch.cosine_similarity(low_gradient, gradient, dim=0) > 0.97


def test_mixed_precision_training_chooses_the_tables_ranks(tmp_path):
    """bf16-mixed: the gate stays in fp32, so that every step trains the ranks that the table and an export name."""

    class Compare(pl.Callback):
        seen = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.context.recording = True

        def on_after_backward(self, trainer, pl_module):
            batch_tasks = pl_module.context.get("task_id", 6).tolist()
            for slot, ranks in pl_module.rank_table().items():
                used = (pl_module.context.records[slot].weights.squeeze(1).argmax(1) + 1).tolist()
                assert used == [ranks[task] for task in batch_tasks]
                self.seen += 1

    module, compare = more(rank=64, scaling="none"), Compare()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", precision="bf16-mixed", max_steps=4, callbacks=[compare],
        enable_checkpointing=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([random_batch(6, seed=seed) for seed in range(4)], batch_size=None))
    assert compare.seen == 4 * len(module.adapted)
