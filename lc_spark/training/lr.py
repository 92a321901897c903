"""Trains LR with Spark MLlib on the shards, and gives its weights readable values."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyspark.ml.classification import LogisticRegression, LogisticRegressionModel
from pyspark.ml.common import _py2java
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import DenseVector
from pyspark.sql import Column, DataFrame, SparkSession, Window, WindowSpec
from pyspark.sql import functions as F

from lc_spark import metrics
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import first_date
from lc_spark.field_map import FieldMap
from lc_spark.files import AnyPath
from lc_spark.systems import Training
from lc_spark.training import models
from lc_spark.training.lr_network import Part

log = logging.getLogger("lc_spark")


@dataclass(frozen=True)
class LrFit:
    """A fitted LR: weights float64 [d], and the objective before and after each L-BFGS pass."""

    weights: NDArray[np.float64]
    bias: float
    l2: float
    loss_history: tuple[float, ...]
    iterations: int
    seconds: float


@dataclass(frozen=True)
class LrStart:
    """Where L-BFGS begins: weights float64 [d] and bias."""

    weights: NDArray[np.float64]
    bias: float


def fit_lr(
    vectors_df: DataFrame, config: Config, l2: float, start: LrStart | None = None
) -> tuple[LrFit, LogisticRegressionModel]:
    """Fit MLlib's LogisticRegression by L-BFGS on (label, features), from a start or zero."""
    estimator = LogisticRegression(
        maxIter=config.lr.max_iterations,
        regParam=l2,
        tol=config.lr.tolerance,
        standardization=False,  # one-hot inputs share a scale; continuous ones are standardised
    )
    if start is not None:
        _begin_at(estimator, start)
    started = time.perf_counter()
    model = estimator.fit(vectors_df)
    seconds = time.perf_counter() - started
    summary = model.summary
    fit = LrFit(
        weights=model.coefficients.toArray(),
        bias=float(model.intercept),
        l2=l2,
        loss_history=tuple(summary.objectiveHistory),
        iterations=int(summary.totalIterations),
        seconds=seconds,
    )
    return fit, model


def _begin_at(estimator: LogisticRegression, start: LrStart) -> None:
    """Give MLlib's estimator its initial model, which Scala has and Python does not show."""
    context = SparkSession.active().sparkContext
    assert context._jvm is not None, "a session is active"
    assert estimator._java_obj is not None, "it is an estimator of Scala's"
    weights = _py2java(context, DenseVector(start.weights))
    package = context._jvm.org.apache.spark.ml.classification
    initial = package.LogisticRegressionModel("start", weights, start.bias)
    estimator._java_obj.setInitialModel(initial)


def start_of(folder: AnyPath, places: NDArray[np.int64], d: int) -> LrStart:
    """Return the weights of a saved LR as a start over d features, zero where it had none."""
    model, _ = models.load(folder)
    assert isinstance(model, models.Lr), "an LR's folder holds an LR"
    weights = np.zeros(d)
    weights[places] = model.weight.detach().double().numpy()
    return LrStart(weights, model.bias.item())


def scores_df(model: LogisticRegressionModel, vectors_df: DataFrame) -> DataFrame:
    """Return (label, score) of vectors."""
    positive = vector_to_array(F.col("probability"))[1]
    return model.transform(vectors_df).select("label", positive.alias("score"))


def fit_path(
    train_df: DataFrame, valid_df: DataFrame, config: Config, start: LrStart | None = None
) -> tuple[LrFit, LogisticRegressionModel, dict[float, float]]:
    """Fit LR for every lr.l2; return the one with the lowest validation log loss, and all of these.

    The fits share train_df: cache it. Test rows choose nothing.
    """
    tried = []
    losses: dict[float, float] = {}
    for l2 in sorted(config.lr.l2, reverse=True):
        fit, model = fit_lr(train_df, config, l2, start)
        losses[l2] = metrics.log_loss(scores_df(model, valid_df))
        log.info("train_lr: l2 %g: validation log loss %.5f (%.0f s)", l2, losses[l2], fit.seconds)
        tried.append((fit, model))
    fit, model = min(tried, key=lambda pair: losses[pair[0].l2])
    return fit, model, losses


def held_out_parts(config: Config, manifest: dict[str, Any]) -> dict[str, Column]:
    """Return for every LR that some start needs: its folder's name, and the train rows it sees."""
    parts: dict[str, Column] = {}
    if manifest["folds"] != config.shards.folds:
        raise LcSparkError(
            f"shards.folds is {config.shards.folds}, but the shards were written with "
            f"{manifest['folds']}: run the stage 'features' again."
        )
    for name in held_out_names(config):
        _, kind, number = name.split("_")
        if kind == "fold":
            parts[name] = F.col("fold") != int(number)
        else:
            parts[name] = F.col("date") < first_date(manifest, int(number))
    return parts


def held_out_names(config: Config) -> list[str]:
    """Return the folders under models/ of the LRs that the systems' starts hold rows out of."""
    trainings = [config.training_of(system) for system in config.systems]
    return sorted({name for training in trainings for name in _held_out(config, training)})


def _held_out(config: Config, training: Training) -> list[str]:
    """Return the names of the LRs that a start reads, one a fold."""
    return {
        "lr_cross_fitted": [f"lr_fold_{fold}" for fold in range(config.shards.folds)],
        "lr_past": [f"lr_past_{training.days}"],
    }.get(training.start, [])


def held_out_folders(config: Config, training: Training) -> tuple[str, ...]:
    """Return the folders of the LRs that a start with held-out rows reads, one a fold."""
    folder = config.run_path / "models"
    return tuple(str(folder / name) for name in _held_out(config, training))


def fit_held_out(
    train_df: DataFrame,
    parts: dict[str, Column],
    l2: float,
    config: Config,
    field_map: FieldMap,
    starts: Mapping[str, LrStart],
) -> dict[str, float]:
    """Fit and save an LR for each part of the train rows; return AUC on the rows they do not see.

    A fit begins at zero, or where an earlier one of the same fold ended: weights that have seen a
    row would bring it back in. The AUC of the folds is over all their rows together
    ("lr_cross_fitted"), that of lr_past under its name.
    """
    unseen: dict[str, DataFrame] = {}
    for name, seen in parts.items():
        fit, model = fit_lr(train_df.where(seen), config, l2, starts.get(name))
        save_lr(fit, config, field_map, name)
        log.info("train_lr: %s: %d passes (%.0f s)", name, fit.iterations, fit.seconds)
        group = "lr_cross_fitted" if name.startswith("lr_fold_") else name
        part_df = scores_df(model, train_df.where(~seen))
        unseen[group] = unseen[group].unionByName(part_df) if group in unseen else part_df
    return {name: metrics.exact_auc(df) for name, df in unseen.items()}


def torch_parts(
    train_df: DataFrame, parts: Mapping[str, Column], manifest: dict[str, Any]
) -> list[Part]:
    """Return what the torch loop is told of the LR of all rows, and of those of held-out parts."""
    counts = train_df.select(F.count("*"), *[F.count_if(seen) for seen in parts.values()]).first()
    assert counts is not None, "an aggregate has a row"
    made = [Part("lr", counts[0])]
    for name, rows in zip(parts, counts[1:], strict=True):
        _, kind, number = name.split("_")
        if kind == "fold":
            made.append(Part(name, rows, fold=int(number)))
        else:
            made.append(Part(name, rows, before=first_date(manifest, int(number))))
    return made


def unfit_parts(train_df: DataFrame, parts: dict[str, Column]) -> dict[str, str]:
    """Return why, by name, for each part that lacks a label in its rows or in the rest."""
    checked = [
        (name, label, text, rows & (F.col("label") == label))
        for name, seen in parts.items()
        for text, rows in (("are fitted on", seen), ("are left to the network", ~seen))
        for label in (0, 1)
    ]
    counts = [F.count_if(rows) for *_, rows in checked]
    row = train_df.select(*counts).first() if counts else None
    return {
        name: f"A start of M1 needs '{name}', but of label {label} no train rows {text}: lower "
        "shards.folds, change training.days, or take another start."
        for (name, label, text, _), n in zip(checked, row or (), strict=False)
        if n == 0
    }


def save_lr(fit: LrFit, config: Config, field_map: FieldMap, name: str = "lr") -> None:
    """Write models/<name>, which LC systems start from and which is scored as they are."""
    facts = {
        "bias": fit.bias,
        "l2": fit.l2,
        "loss_history": fit.loss_history,
        "iterations": fit.iterations,
        "seconds": fit.seconds,
    }
    network = models.Lr.from_weights(fit.weights, fit.bias)
    models.save(network, config.run_path / "models" / name, field_map.fingerprint, facts)


def lr_weights_df(
    spark: SparkSession, fit: LrFit, levels_df: DataFrame, field_map: FieldMap
) -> DataFrame:
    """Return (field, value, index, count, weight), one row a feature."""
    return with_levels(weights_df(spark, fit, field_map), levels_df)


def weights_df(spark: SparkSession, fit: LrFit, field_map: FieldMap) -> DataFrame:
    """Return (field, index, weight), one row a feature."""
    lengths = [info.size for info in field_map.fields]
    table = pd.DataFrame(
        {
            "field": np.repeat([info.name for info in field_map.fields], lengths),
            "index": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            "weight": fit.weights,
        }
    )
    return spark.createDataFrame(table, "field string, index int, weight double")


def with_levels(by_index_df: DataFrame, levels_df: DataFrame) -> DataFrame:
    """Return (field, value, index, count, weight) of (field, index, weight)."""
    return by_index_df.join(levels_df, ["field", "index"], how="left").select(
        "field", "value", "index", "count", "weight"
    )


def field_importance_df(weights_df: DataFrame) -> DataFrame:
    """Return (field, features, importance), the most important first.

    importance is the standard deviation, over the train rows, of what the field adds to LR's
    logit. A continuous value has sd 1 on the train rows, so its |weight| is that deviation.
    """
    share = F.col("count") / F.sum("count").over(_by_field())
    mean = F.sum(share * F.col("weight")).over(_by_field())
    spread_df = weights_df.withColumn("part", share * (F.col("weight") - mean) ** 2)
    value_weight = F.max(F.when(F.col("value") == "(value)", F.abs("weight")))
    return (
        spread_df.groupBy("field")
        .agg(
            F.count("*").alias("features"),
            F.coalesce(value_weight, F.sqrt(F.sum("part"))).alias("importance"),
        )
        .orderBy(F.desc("importance"), "field")
    )


def _by_field() -> WindowSpec:
    return Window.partitionBy("field")
