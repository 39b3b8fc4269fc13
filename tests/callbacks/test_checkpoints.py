"""The last checkpoint is that of the last validation, whether anything got better or not."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from moe_peft.callbacks.checkpoints import AdapterCheckpoint


class Worsening(pl.LightningModule):
    """Validates worse every time."""

    def __init__(self):
        super().__init__()
        self.layer, self.value = torch.nn.Linear(2, 1), 1.0

    def training_step(self, batch, _):
        return self.layer(batch[0]).sum()

    def validation_step(self, *_):
        self.log("val/mean", torch.tensor(self.value))

    def on_validation_epoch_end(self):
        self.value -= 0.1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LastStep(pl.Callback):
    """Reads the last checkpoint's step before every step."""

    def __init__(self, file):
        self.file, self.seen = file, {}

    def on_train_batch_start(self, trainer, *_):
        if self.file.exists():
            self.seen[trainer.global_step] = torch.load(self.file, weights_only=True)["global_step"]


@pytest.mark.parametrize("interval", [1.0, 2])
def test_a_validation_that_is_no_better_renews_the_last_checkpoint(tmp_path, interval):
    rows = DataLoader(TensorDataset(torch.ones(4, 2)))
    watch = LastStep(tmp_path / "checkpoints" / "last.ckpt")
    trainer = pl.Trainer(
        max_epochs=3,
        val_check_interval=interval,
        callbacks=[watch, AdapterCheckpoint()],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Worsening(), rows, rows)
    every = 4 if interval == 1.0 else 2
    assert watch.seen == {step: step // every * every for step in range(every, 12)}
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == every and torch.load(watch.file, weights_only=True)["global_step"] == 12
