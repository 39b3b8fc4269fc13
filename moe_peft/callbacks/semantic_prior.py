"""Fits a method's semantic prior to training prompts before the first step (arXiv 2404.08985; K-means).

The callback only fits: embedder and centroids are the module's own state, so a checkpoint tests without it.
Shapes: N texts, d embedding width, K clusters, T tasks.
"""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.layers.prior import SemanticPrior

logger = logging.getLogger(__name__)


class ClusterReport(NamedTuple):
    """What the clusters hold."""

    table: numpy.ndarray
    """[T, K] texts of each task in each cluster."""
    silhouette: numpy.ndarray
    """[K] mean silhouette of each cluster's texts; nan for an empty one, or where K is 1 or N."""
    mean_silhouette: float
    """Over all texts."""


class SemanticPriorFit(pl.Callback):
    """Clusters training prompts and stores the centroids in the method's prior; a resumed run keeps what it has.

    Args:
        max_texts: training prompts at most, stratified by task.
        seed: of the choice of texts and of K-means.
        n_init: K-means starts; the best is kept.
        max_iter: Lloyd iterations per start.
    """

    def __init__(self, max_texts: int = 2000, seed: int = 0, n_init: int = 10, max_iter: int = 300) -> None:
        for name, value in (("max_texts", max_texts), ("n_init", n_init), ("max_iter", max_iter)):
            if value < 1:
                raise ValueError(f"SemanticPriorFit: {name} is {value}, it must be at least 1")
        self.max_texts, self.seed, self.n_init, self.max_iter = max_texts, seed, n_init, max_iter

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a method that has no prior. Fitting waits: FSDP restores a checkpoint only after this hook."""
        _prior_of(pl_module)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fits before the first validation batch; not called on resume."""
        self._fit_once(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fits before the first step, where there was no sanity check."""
        self._fit_once(trainer, pl_module)

    def _fit_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        prior = _prior_of(pl_module)
        if prior.fitted and prior.embedder.fitted:
            if not trainer.sanity_checking and trainer.ckpt_path is not None:
                logger.info("semantic prior: kept as restored from %s", trainer.ckpt_path)
            return
        datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not hasattr(datamodule, "sample_prompts"):
            raise ValueError("SemanticPriorFit needs training prompts: pass a MultitaskDataModule to the trainer")
        with isolate_rng():
            batches: Sequence[Batch] = datamodule.sample_prompts(self.max_texts, self.seed)
            # Every rank embeds, because a sharded backbone answers only if all ask; one clusters, all take its result.
            embeddings = prior.embedder.fit([_to(batch, prior.centroids.device) for batch in batches])
            check_distinct(embeddings, prior.clusters)
            if trainer.is_global_zero:
                prior.set_centroids(kmeans(embeddings, prior.clusters, self.seed, self.n_init, self.max_iter))
        state = {name: value.cpu() for name, value in prior.state_dict().items()}
        prior.load_state_dict(trainer.strategy.broadcast(state))
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            task_ids = torch.cat([batch["task_id"] for batch in batches if "task_id" in batch]).cpu().numpy()
            names = [spec.name for spec in datamodule.specs]
            labels = prior.assign(embeddings).cpu().numpy()
            report = count_clusters(embeddings.cpu().numpy(), labels, task_ids, prior.clusters, len(names))
            _publish(trainer, report, names)


def kmeans(embeddings: Tensor, clusters: int, seed: int, n_init: int = 10, max_iter: int = 300) -> Tensor:
    """Runs scikit-learn's K-means on one thread, so that the same texts give the same centroids on every machine.

    Args:
        embeddings: [N, d].
        clusters: K, at most the number of distinct rows.
        seed: of the starts.
        n_init: starts; the best is kept.
        max_iter: Lloyd iterations per start.

    Returns:
        Centroids [K, d] in the dtype and on the device of `embeddings`.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    fitted = KMeans(clusters, n_init=n_init, max_iter=max_iter, tol=0.0, random_state=seed, algorithm="lloyd")  # pyright: ignore[reportArgumentType]
    with threadpool_limits(1):
        fitted.fit(embeddings.double().cpu().numpy())
    if fitted.n_iter_ >= max_iter:
        logger.warning("semantic prior: K-means did not converge in max_iter=%d iterations", max_iter)
    return torch.from_numpy(fitted.cluster_centers_).to(embeddings)


def check_distinct(embeddings: Tensor, clusters: int) -> None:
    """Refuses more clusters than there are different texts.

    Raises:
        ValueError: `clusters` is larger than the number of distinct rows of `embeddings` [N, d].
    """
    # Equal texts in different batches differ in the last bits.
    distinct = len(numpy.unique(embeddings.cpu().numpy().round(5), axis=0))
    if clusters > distinct:
        raise ValueError(
            f"clusters is {clusters}, but the {len(embeddings)} training texts hold only {distinct} different ones: "
            "lower clusters, or raise max_texts or add training rows"
        )


def count_clusters(
    embeddings: numpy.ndarray, labels: numpy.ndarray, task_ids: numpy.ndarray, clusters: int, tasks: int
) -> ClusterReport:
    """Counts and rates a clustering.

    Args:
        embeddings: [N, d].
        labels: [N] cluster of each text.
        task_ids: [N] task of each text.
        clusters: K.
        tasks: T.
    """
    from sklearn.metrics import silhouette_samples

    table = numpy.zeros((tasks, clusters), dtype=numpy.int64)
    numpy.add.at(table, (task_ids, labels), 1)
    per_cluster, mean = numpy.full(clusters, numpy.nan), float("nan")
    if 2 <= len(numpy.unique(labels)) < len(labels):
        rated = numpy.asarray(silhouette_samples(embeddings, labels))
        mean = float(rated.mean())
        for cluster in numpy.unique(labels):
            per_cluster[cluster] = rated[labels == cluster].mean()
    return ClusterReport(table, per_cluster, mean)


def write_report(report: ClusterReport, names: Sequence[str], file: Path) -> None:
    """Writes one line per cluster (its size, silhouette and texts per task) and a last line for all of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["cluster", "size", "silhouette", *names])
        for cluster, (column, value) in enumerate(zip(report.table.T, report.silhouette, strict=True)):
            writer.writerow([cluster, column.sum(), f"{value:.6f}", *column])
        writer.writerow(["all", report.table.sum(), f"{report.mean_silhouette:.6f}", *report.table.sum(1)])


def _publish(trainer: pl.Trainer, report: ClusterReport, names: Sequence[str]) -> None:
    """Hands the report to the log, the trainer's loggers and the run folder."""
    sizes = report.table.sum(0)
    summary = "semantic prior: %d texts in %d clusters of %d to %d, silhouette %.3f; texts per task and cluster:"
    logger.info(summary, sizes.sum(), len(sizes), sizes.min(), sizes.max(), report.mean_silhouette)
    for name, row in zip(names, report.table, strict=True):
        logger.info("  %s: %s", name, " ".join(map(str, row)))
    metrics = {"smallest_cluster": float(sizes.min()), "largest_cluster": float(sizes.max())}
    metrics |= {} if numpy.isnan(report.mean_silhouette) else {"silhouette": report.mean_silhouette}
    for sink in trainer.loggers:
        sink.log_metrics({f"prior/{name}": value for name, value in metrics.items()}, step=trainer.global_step)
    write_report(report, names, Path(trainer.default_root_dir) / "routing" / "prior_clusters.csv")


def _prior_of(pl_module: pl.LightningModule) -> SemanticPrior:
    prior = getattr(pl_module, "prior", None)
    if not isinstance(prior, SemanticPrior):
        raise ValueError(f"SemanticPriorFit: {type(pl_module).__name__} has no semantic prior: remove this callback")
    return prior


def _to(batch: Batch, device: torch.device) -> Batch:
    moved: Any = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return moved
