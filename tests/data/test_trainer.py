"""The data module under a real Trainer: fit, resume and predict."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_peft.data.module import MultitaskDataModule
from tests.data.toys import ToyBackbone, class_rows, write_task


class Recorder(LightningModule):
    """Records the rows of every step; its one parameter learns nothing of interest."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen.append(batch["row_id"])
        return self.weight * batch["input_ids"].float().sum()

    def validation_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, path, steps, accumulation=1, **arguments):
    module = Recorder()
    trainer = Trainer(
        default_root_dir=path,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        callbacks=[ModelCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=-1)],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, data, **arguments)
    return module.seen


def test_trainer_gets_new_orders_and_whole_global_batches_under_accumulation(make_data, tmp_path):
    plain = fit(make_data(), tmp_path / "a", 12)
    accumulated = fit(make_data(), tmp_path / "b", 12, accumulation=4)
    assert [sum(accumulated[at : at + 4], []) for at in range(0, 48, 4)] == plain
    assert plain[:6] != plain[6:]


@pytest.mark.parametrize("stop", [1, 4, 6, 8, 12])  # an epoch has 6 steps
def test_run_killed_at_a_step_resumes_with_the_rows_that_were_next(make_data, tmp_path, stop):
    whole = fit(make_data(), tmp_path, 14, accumulation=2)
    after = fit(make_data(), tmp_path, 14, accumulation=2, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert after == whole[2 * stop :]


@pytest.mark.parametrize(
    ("accumulation", "changes", "telling"),
    [(4, {}, "accumulate_grad_batches=4"), (2, {"batch_size": 4}, "batch_size=4"), (2, {"seed": 1}, "seed=1")],
)
def test_resuming_with_other_rows_is_refused(make_data, tmp_path, accumulation, changes, telling):
    fit(make_data(seed=0), tmp_path, 4, accumulation=2)
    with pytest.raises(ValueError, match=telling):
        data = make_data(**{"seed": 0, **changes})
        fit(data, tmp_path, 14, accumulation=accumulation, ckpt_path=tmp_path / "step=4.ckpt")


def test_batch_size_that_does_not_divide_fails_before_training(make_data, tmp_path):
    with pytest.raises(ValueError, match="batch_size=8.*3 accumulation"):
        fit(make_data(), tmp_path, 2, accumulation=3)


class Echo(Recorder):
    """Predicts which rows it was given."""

    def predict_step(self, batch, batch_index):
        return [(row["id"], row["label"], len(row["choices"])) for row in batch["rows"]]


def predict(data, path):
    trainer = Trainer(default_root_dir=path, logger=False, enable_progress_bar=False, accelerator="cpu")
    return [row for batch in trainer.predict(Echo(), data) for row in batch]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_trainer_predicts_every_row_once(make_data, tmp_path, num_workers):
    found = predict(make_data(eval_batch_size=6, num_workers=num_workers), tmp_path)
    labelled = [(str(i), i % 2, 2) for i in range(2000, 2007)] + [(str(i), 0, 3) for i in range(2000, 2007)]
    assert sorted(found) == sorted(labelled)


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_trainer_predicts_a_folder_that_holds_unlabelled_rows_alone(tmp_path, kind):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in class_rows(5)]
    folder = write_task(tmp_path / "films", {"test": rows})
    data = MultitaskDataModule([str(folder)], ToyBackbone(kind))
    assert sorted(predict(data, tmp_path)) == [(str(i), None, 2) for i in range(5)]
    with pytest.raises(ValueError, match=r"has no train.jsonl"):
        data.setup("test")


def test_rows_read_for_prediction_do_not_stand_in_for_labelled_ones(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in class_rows(5)]
    folder = write_task(tmp_path / "films", {"train": class_rows(2), "validation": class_rows(2), "test": rows})
    data = MultitaskDataModule([str(folder)], ToyBackbone())
    data.setup("predict")
    with pytest.raises(ValueError, match="the label is missing"):
        data.setup("test")
