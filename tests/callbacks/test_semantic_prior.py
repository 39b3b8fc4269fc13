"""Fitting the semantic prior: when, to what, the same everywhere; what the report counts."""

import csv
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.backbones import CausalLM
from moe_peft.callbacks import semantic_prior
from moe_peft.callbacks.semantic_prior import SemanticPriorFit, check_distinct, count_clusters, kmeans
from moe_peft.context import RoutingContext
from moe_peft.layers.prior import SemanticPrior

LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


class Method(pl.LightningModule):
    """A backbone, a prior and one trainable number; notes whether the prior was fitted at every batch."""

    def __init__(self, clusters=4):
        super().__init__()
        self.prior = SemanticPrior(clusters=clusters)
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def configure_model(self):
        if not hasattr(self, "bound"):
            torch.manual_seed(0)
            backbone = CausalLM("tiny", "float32", shape=LLAMA, random_weights=True)
            self.bound = (backbone, backbone.load(), RoutingContext())
            self.prior.bind(*self.bound)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.prior.centroids.clone())
        return self.weight * self.prior(batch).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.prior.centroids.clone())
        self.prior(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Prompts(pl.LightningDataModule):
    """Two tasks whose prompts use different halves of the vocabulary."""

    def __init__(self, rows=40):
        super().__init__()
        self.specs = [SimpleNamespace(name="low"), SimpleNamespace(name="high")]
        self.rows, self.asked = rows, []

    def sample_prompts(self, count, seed):
        self.asked.append((count, seed))
        return [self.batch(start) for start in range(0, min(count, self.rows), 4)]

    def batch(self, start):
        generator = torch.Generator().manual_seed(start)
        task_id = torch.tensor([0, 1, 0, 1])
        ids = torch.randint(1, 30, (4, 6), generator=generator) + 29 * task_id[:, None]
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "prompt_mask": mask.bool(), "task_id": task_id}

    def loader(self):
        return DataLoader([self.batch(start) for start in (0, 4)], batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = loader


def trainer(folder, **options):
    options = {"max_steps": 2, "callbacks": [SemanticPriorFit(seed=3)], "logger": False} | options
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options
    )


def all_embeddings(method, data):
    with torch.no_grad():
        return torch.cat([method.prior.embedder(batch) for batch in data.sample_prompts(2000, 3)])


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_fresh_run_fits_once_before_its_first_batch(tmp_path, sanity):
    method, data = Method(), Prompts()
    trainer(tmp_path, num_sanity_val_steps=sanity).fit(method, data)
    assert data.asked == [(2000, 3)]
    assert method.seen and all(torch.equal(found, method.prior.centroids) for found in method.seen)


def test_every_training_text_is_nearest_to_the_mean_of_its_own_cluster(tmp_path):
    method, data = Method(), Prompts()
    trainer(tmp_path).fit(method, data)
    embeddings = all_embeddings(method, data)
    labels = method.prior.assign(embeddings)
    means = torch.stack([embeddings[labels == cluster].mean(0) for cluster in range(4)])
    torch.testing.assert_close(means, method.prior.centroids)


def test_a_resumed_run_never_fits_again(tmp_path):
    method, data = Method(), Prompts()
    first = trainer(tmp_path)
    first.fit(method, data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed, other = Method(), Prompts(rows=24)
    trainer(tmp_path, max_steps=4).fit(resumed, other, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert not other.asked and resumed.global_step == 4
    assert all(torch.equal(found, method.prior.centroids) for found in resumed.seen)


def test_a_resume_that_restores_late_never_fits_again(tmp_path, monkeypatch):
    """FSDP2's strategy restores after `on_fit_start`: a single-device strategy is made to do so too."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    method, data = Method(), Prompts()
    first = trainer(tmp_path)
    first.fit(method, data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setattr(SingleDeviceStrategy, "restore_checkpoint_after_setup", property(lambda self: True))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    resumed, other = Method(), Prompts(rows=24)
    trainer(tmp_path, max_steps=4).fit(resumed, other, ckpt_path=tmp_path / "last.ckpt")
    assert not other.asked and all(torch.equal(found, method.prior.centroids) for found in resumed.seen)


def test_test_runs_without_the_callback(tmp_path):
    method, data = Method(), Prompts()
    first = trainer(tmp_path)
    first.fit(method, data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    fresh = Method()
    trainer(tmp_path, callbacks=[]).test(
        fresh, data, ckpt_path=tmp_path / "last.ckpt", weights_only=False, verbose=False
    )
    assert torch.equal(fresh.prior(data.batch(0)), method.prior(data.batch(0)))


def test_fitting_leaves_the_random_numbers_alone(tmp_path):
    method, data = Method(), Prompts()
    fake = SimpleNamespace(
        sanity_checking=False, ckpt_path=None, datamodule=data, is_global_zero=True, fast_dev_run=True
    )
    fake.strategy = SimpleNamespace(broadcast=lambda value: value)
    method.configure_model()
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    SemanticPriorFit().on_train_start(fake, method)
    assert torch.equal(before[0], torch.get_rng_state())
    assert numpy.array_equal(before[1], numpy.random.get_state()[1])
    assert method.prior.fitted


def test_another_rank_takes_what_rank_zero_found(tmp_path):
    """The second rank gets all state by broadcast and clusters nothing itself."""
    sent = []
    zero = SimpleNamespace(sanity_checking=False, ckpt_path=None, datamodule=Prompts(), fast_dev_run=True)
    zero.is_global_zero, zero.strategy = True, SimpleNamespace(broadcast=lambda value: sent.append(value) or value)
    one = SimpleNamespace(**vars(zero) | {"is_global_zero": False, "datamodule": Prompts()})
    one.strategy = SimpleNamespace(broadcast=lambda value: sent[0])
    methods = Method(), Method()
    for method, fake in zip(methods, (zero, one), strict=True):
        method.configure_model()
        SemanticPriorFit().on_train_start(fake, method)
    for name, value in methods[0].prior.state_dict().items():
        assert torch.equal(methods[1].prior.state_dict()[name], value)
    assert methods[1].prior.fitted


def test_kmeans_is_reproducible_and_seeded():
    points = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    one = kmeans(points, 7, seed=1, n_init=1)
    assert torch.equal(one, kmeans(points, 7, seed=1, n_init=1))
    assert not torch.equal(one, kmeans(points, 7, seed=2, n_init=1))


def test_kmeans_that_stops_early_says_so(caplog):
    kmeans(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), 7, seed=1, max_iter=1)
    assert "did not converge in max_iter=1" in caplog.text


def test_more_clusters_than_different_texts_is_refused():
    points = torch.eye(3).repeat(4, 1) + 1e-7 * torch.rand(12, 3)
    check_distinct(points, 3)
    with pytest.raises(ValueError, match="clusters is 4, but the 12 training texts hold only 3 different ones"):
        check_distinct(points, 4)


def test_too_many_clusters_stop_the_run_before_training(tmp_path):
    method = Method(clusters=50)
    with pytest.raises(ValueError, match="clusters is 50, but the 40 training texts"):
        trainer(tmp_path).fit(method, Prompts())
    assert not method.seen and not (tmp_path / "routing").exists()


def test_a_method_without_a_prior_is_refused(tmp_path):
    method = Method()
    method.prior = None
    method.configure_model = lambda: None
    with pytest.raises(ValueError, match="Method has no semantic prior"):
        trainer(tmp_path).fit(method, Prompts())


@pytest.mark.parametrize("name", ["max_texts", "n_init", "max_iter"])
def test_bad_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        SemanticPriorFit(**{name: 0})


def test_the_report_equals_a_recount(tmp_path):
    method, data = Method(), Prompts()
    trainer(tmp_path).fit(method, data)
    embeddings = all_embeddings(method, data)
    labels = method.prior.assign(embeddings).tolist()
    tasks = torch.cat([batch["task_id"] for batch in data.sample_prompts(2000, 3)]).tolist()
    with (tmp_path / "routing" / "prior_clusters.csv").open() as stream:
        *lines, last = csv.DictReader(stream)
    for cluster, line in enumerate(lines):
        inside = [task for task, label in zip(tasks, labels, strict=True) if label == cluster]
        found = [int(line[name]) for name in ("cluster", "size", "low", "high")]
        assert found == [cluster, len(inside), inside.count(0), inside.count(1)]
    assert [last["size"], last["low"], last["high"]] == ["40", "20", "20"]
    assert float(last["silhouette"]) == pytest.approx(silhouette_by_hand(embeddings, labels), abs=1e-5)


def silhouette_by_hand(points, labels):
    distances, labels = torch.cdist(points.double(), points.double()), torch.tensor(labels)
    scores = []
    for row, label in enumerate(labels):
        own = (labels == label) & (torch.arange(len(labels)) != row)
        if not own.any():
            scores.append(0.0)
            continue
        inside = distances[row][own].mean()
        outside = min(distances[row][labels == other].mean() for other in set(labels.tolist()) - {int(label)})
        scores.append(float((outside - inside) / max(inside, outside)))
    return sum(scores) / len(scores)


def test_one_cluster_has_no_silhouette():
    report = count_clusters(numpy.eye(3), numpy.zeros(3, int), numpy.array([0, 1, 1]), clusters=1, tasks=2)
    assert report.table.tolist() == [[1], [2]] and numpy.isnan(report.mean_silhouette)


def test_a_dry_run_fits_and_writes_nothing(tmp_path):
    method = Method()
    trainer(tmp_path, fast_dev_run=True).fit(method, Prompts())
    assert method.prior.fitted and not list(tmp_path.iterdir())


def test_the_loggers_get_the_silhouette(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    trainer(tmp_path, logger=CSVLogger(tmp_path)).fit(Method(), Prompts())
    (file,) = tmp_path.rglob("metrics.csv")
    assert "prior/silhouette" in file.read_text().splitlines()[0]


def test_only_the_main_process_publishes(monkeypatch):
    def refuse(*args):
        raise AssertionError("published on another rank")

    monkeypatch.setattr(semantic_prior, "_publish", refuse)
    method, data = Method(), Prompts()
    fake = SimpleNamespace(sanity_checking=False, ckpt_path=None, datamodule=data, is_global_zero=False)
    fake.strategy = SimpleNamespace(broadcast=lambda value: value)
    method.configure_model()
    SemanticPriorFit().on_train_start(fake, method)
