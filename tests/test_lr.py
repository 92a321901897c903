"""LR on the shards is the LR of MLlib, of scikit-learn and of the stored torch model alike."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from conftest import ConfigMaker
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.functions import vector_to_array
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from sklearn.linear_model import LogisticRegression as ScikitLearnLr
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from training_data import DAYS, FIELD_MAP, FIRST_DATE, FOLDS, write_shards

from lc_spark import config_file, ingest, metrics, pipeline, score, tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.features.shards import part_files, read_field_map
from lc_spark.features.vectors import read_shards, shard_vectors
from lc_spark.field_kinds import Bucketed
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.training import lr, models

FLIGHTS = Path(__file__).parent.parent / "conf" / "flights.yaml"


def test_vectors_hold_offset_and_value_of_every_kind_of_field(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    field_map = FieldMap(
        (
            FieldInfo("site", "categorical", 4, column="site"),  # 0 .. 3
            FieldInfo("tags", "multivalued", 5, column="tags", max_values=3),  # 4 .. 8
            FieldInfo("price", "continuous", 2, column="price"),  # 9 missing, 10 value
            FieldInfo("hour", "bucketed", 3, column="hour", cut_points=(12.0,)),  # 11 .. 13
        )
    )
    config = make_config()
    rows = [
        (1, 1.0, 0, 9, 3, [2, 4, -1], 0.5, 1),
        (2, 0.0, 4, 9, 0, [0, -1, -1], float("nan"), 0),
        (3, 1.0, 2, 8, 1, [1, 2, 3], -1.5, 2),
        (4, 0.0, 1, 9, 2, [4, -1, -1], 0.0, 2),
    ]
    schema = "row_id long, label float, fold int, date int, site int, tags array<int>, price float"
    schema += ", hour int"
    folder = config.workspace_path / "shards" / "split=train"
    spark.createDataFrame(rows, schema).coalesce(1).write.parquet(str(folder))
    vectors = str(config.workspace_path / "vectors")
    found = shard_vectors(spark, config, field_map, "train", vectors).orderBy("row_id").collect()
    assert [(r["row_id"], r["label"], r["fold"]) for r in found] == [row[:3] for row in rows]
    assert [r["features"].size for r in found] == [14] * 4
    assert [dict(zip(r["features"].indices, r["features"].values, strict=True)) for r in found] == [
        {3: 1.0, 6: 1.0, 8: 1.0, 10: 0.5, 12: 1.0},
        {0: 1.0, 4: 1.0, 9: 1.0, 11: 1.0},
        {1: 1.0, 5: 1.0, 6: 1.0, 7: 1.0, 10: -1.5, 13: 1.0},
        {2: 1.0, 8: 1.0, 10: 0.0, 13: 1.0},
    ]


def test_without_shards_the_stage_to_run_is_named(
    spark: SparkSession, make_config: ConfigMaker
) -> None:
    with pytest.raises(LcSparkError, match="no train shards: run the stage 'features' first"):
        read_shards(spark, make_config(), "train")


def matrix_of(config: Config, field_map: FieldMap, split: str) -> tuple[sp.csr_matrix, pd.Series]:
    """Read shards without Spark into a sparse matrix [n, d] and labels."""
    table = pd.concat(
        pq.read_table(path).to_pandas()
        for path in part_files(config.workspace_path / "shards", split)
    ).reset_index(drop=True)
    blocks = []
    for info in field_map.fields:
        block = sp.lil_matrix((len(table), info.size))
        values = table[info.name].to_numpy()
        if info.kind == "multivalued":
            for row, indices in enumerate(values):
                block[row, indices[indices >= 0]] = 1
        elif info.kind == "continuous":
            missing = np.isnan(values)
            dense = np.stack([missing.astype(float), np.where(missing, 0, values)], axis=1)
            block = sp.csr_matrix(dense)
        else:
            ones = np.ones(len(table))
            block = sp.csr_matrix((ones, (np.arange(len(table)), values)), block.shape)
        blocks.append(block)
    return sp.hstack(blocks).tocsr(), table["label"]


def scikit_learn_lr(x: sp.csr_matrix, y: pd.Series, l2: float) -> ScikitLearnLr:
    # MLlib: mean loss + l2 / 2 |w|^2; scikit-learn: C * sum of losses + 1 / 2 |w|^2.
    return ScikitLearnLr(C=1 / (x.shape[0] * l2), tol=1e-8, max_iter=2000).fit(x, y)


def make_sets(path: Path) -> None:
    """Take repeated tags out of a part, as the encoder does."""
    table = pq.read_table(path)
    at = table.column_names.index("tags")
    sets = [sorted({tag for tag in tags if tag >= 0}) for tags in table["tags"].to_pylist()]
    padded = [tags + [-1] * (FIELD_MAP["tags"].max_values - len(tags)) for tags in sets]
    column = pa.array(padded, pa.list_(pa.int32()))
    path.with_name(f".{path.name}.crc").unlink()
    pq.write_table(table.set_column(at, "tags", column), path)


@pytest.fixture(scope="module")
def small(spark: SparkSession, make_config: ConfigMaker) -> tuple[Config, lr.LrFit]:
    """Made-up shards with every kind of field, and the LR that was fitted and saved on them."""
    settings = {"lr": {"l2": 1e-3, "max_iterations": 500, "tolerance": 1e-10}}
    config = make_config(settings)
    write_shards(Path(config.workspace), FIELD_MAP, {"train": [1500, 1500], "test": [1000]})
    for split in ("train", "test"):
        for path in part_files(config.workspace_path / "shards", split):
            make_sets(Path(str(path)))
    vectors = str(config.workspace_path / "vectors")
    [l2] = config.lr.l2
    fit, _ = lr.fit_lr(shard_vectors(spark, config, FIELD_MAP, "train", vectors), config, l2)
    lr.save_lr(fit, config, FIELD_MAP)
    return config, fit


def test_weights_equal_scikit_learns_on_the_same_matrix(small: tuple[Config, lr.LrFit]) -> None:
    config, fit = small
    x, y = matrix_of(config, FIELD_MAP, "train")
    assert x.shape == (3000, FIELD_MAP.d)
    theirs = scikit_learn_lr(x, y, config.lr.l2[0])
    assert fit.weights == pytest.approx(theirs.coef_[0], abs=1e-3)
    assert fit.bias == pytest.approx(theirs.intercept_[0], abs=1e-3)
    assert np.abs(fit.weights).max() > 0.5, "there is something to find"


def test_the_objective_falls_to_the_mean_loss_with_its_penalty(
    small: tuple[Config, lr.LrFit],
) -> None:
    config, fit = small
    x, y = matrix_of(config, FIELD_MAP, "train")
    signed = (x @ fit.weights + fit.bias) * (2 * y.to_numpy() - 1)
    penalty = config.lr.l2[0] / 2 * (fit.weights**2).sum()
    assert fit.loss_history[-1] == pytest.approx(np.logaddexp(0, -signed).mean() + penalty)
    assert list(fit.loss_history) == sorted(fit.loss_history, reverse=True)
    assert fit.iterations == len(fit.loss_history) - 1


def test_the_stored_model_scores_as_mllibs_own(
    spark: SparkSession, small: tuple[Config, lr.LrFit]
) -> None:
    config, fit = small
    vectors_df = {
        split: shard_vectors(
            spark, config, FIELD_MAP, split, str(config.workspace_path / "own" / split)
        )
        for split in ("train", "test")
    }
    estimator = LogisticRegression(
        maxIter=500, regParam=config.lr.l2[0], tol=1e-10, standardization=False
    )
    own_df = estimator.fit(vectors_df["train"]).transform(vectors_df["test"])
    theirs = {
        row["row_id"]: row["p"]
        for row in own_df.select(
            "row_id", vector_to_array(F.col("probability"))[1].alias("p")
        ).collect()
    }
    folder = config.workspace_path / "models" / "lr"
    ours_df = score.shard_scores_df(spark, config, FIELD_MAP, {"lr": folder}, "test")
    ours = {row["row_id"]: row["score"] for row in ours_df.collect()}
    assert len(ours) == 1000
    assert ours == pytest.approx(theirs, abs=1e-6)
    network, description = models.load(folder)
    assert description["fingerprint"] == FIELD_MAP.fingerprint
    assert isinstance(network, models.Lr)
    assert network.weight.detach().numpy() == pytest.approx(fit.weights, abs=1e-7)


def held_out_config(make_config: ConfigMaker, small: Config, **lr_settings: object) -> Config:
    """Return a config over the small shards whose systems need folds and the last three days."""
    systems = [
        {"system": "lc_dnn", "name": "folds", "training": {"start": "lr_cross_fitted"}},
        {"system": "lc_dnn", "name": "past", "training": {"start": "lr_past", "days": 3}},
    ]
    settings = {"lr": {"max_iterations": 500, "tolerance": 1e-10, **lr_settings}}
    return make_config(
        {
            **settings,
            "workspace": small.workspace,
            "systems": systems,
            "shards": {"folds": FOLDS},
            "source": {"path": "nowhere", "date": "date"},
        }
    )


def test_every_held_out_lr_is_fitted_on_the_other_rows_alone(
    spark: SparkSession, make_config: ConfigMaker, small: tuple[Config, lr.LrFit]
) -> None:
    config = held_out_config(make_config, small[0], l2=1e-3)
    manifest = json.loads((config.workspace_path / "shards" / "manifest.json").read_text())
    parts = lr.held_out_parts(config, manifest)
    assert list(parts) == ["lr_fold_0", "lr_fold_1", "lr_fold_2", "lr_past_3"]
    vectors = str(config.workspace_path / "held_out_vectors")
    train_df = shard_vectors(spark, config, FIELD_MAP, "train", vectors).cache()
    aucs = lr.fit_held_out(train_df, parts, 1e-3, config, FIELD_MAP, {})
    x, y = matrix_of(config, FIELD_MAP, "train")
    rows = pd.concat(
        pq.read_table(path, columns=["fold", "date"]).to_pandas()
        for path in part_files(config.workspace_path / "shards", "train")
    ).reset_index(drop=True)
    seen = {f"lr_fold_{fold}": (rows["fold"] != fold).to_numpy() for fold in range(FOLDS)}
    seen["lr_past_3"] = (rows["date"] < FIRST_DATE + DAYS - 3).to_numpy()
    unseen_scores = np.zeros(len(y))
    for name, mask in seen.items():
        theirs = scikit_learn_lr(x[mask], y[mask], 1e-3)
        ours, _ = models.load(config.workspace_path / "models" / name)
        assert isinstance(ours, models.Lr)
        assert ours.weight.detach().numpy() == pytest.approx(theirs.coef_[0], abs=2e-3)
        scores = theirs.predict_proba(x[~mask])[:, 1]
        if name == "lr_past_3":
            assert aucs[name] == pytest.approx(roc_auc_score(y[~mask], scores), abs=1e-4)
        else:
            unseen_scores[~mask] = scores
    assert aucs["lr_cross_fitted"] == pytest.approx(roc_auc_score(y, unseen_scores), abs=1e-4)


def test_l2_is_chosen_by_the_validation_rows(
    spark: SparkSession, make_config: ConfigMaker, small: tuple[Config, lr.LrFit]
) -> None:
    config = held_out_config(make_config, small[0], l2=[1e-3, 10.0, 0.3])
    vectors_df = {
        split: shard_vectors(
            spark, config, FIELD_MAP, split, str(config.workspace_path / "path" / split)
        )
        for split in ("train", "test")
    }
    fit, model, losses = lr.fit_path(vectors_df["train"], vectors_df["test"], config)
    x_train, y_train = matrix_of(config, FIELD_MAP, "train")
    x_test, y_test = matrix_of(config, FIELD_MAP, "test")
    for l2, loss in losses.items():
        theirs = scikit_learn_lr(x_train, y_train, l2)
        expected = log_loss(y_test, theirs.predict_proba(x_test)[:, 1])
        assert loss == pytest.approx(expected, abs=1e-4)
    assert fit.l2 == min(losses, key=lambda l2: losses[l2]) == 1e-3
    assert model.coefficients.toArray() == pytest.approx(fit.weights)


def test_a_part_without_both_labels_is_told(
    spark: SparkSession, make_config: ConfigMaker, small: tuple[Config, lr.LrFit]
) -> None:
    config = held_out_config(make_config, small[0])
    vectors = str(config.workspace_path / "one_label_vectors")
    train_df = shard_vectors(spark, config, FIELD_MAP, "train", vectors)
    one_df = train_df.where("fold != 1 OR label = 0")
    parts = {f"lr_fold_{fold}": F.col("fold") != fold for fold in range(FOLDS)}
    [(name, why)] = lr.unfit_parts(one_df, parts).items()
    assert name == "lr_fold_1"
    assert "needs 'lr_fold_1', but of label 1 no train rows are left to the network" in why


def test_shards_of_another_number_of_folds_are_refused(
    make_config: ConfigMaker, small: tuple[Config, lr.LrFit]
) -> None:
    config = held_out_config(make_config, small[0])
    with pytest.raises(
        LcSparkError, match=r"shards\.folds is 3, but the shards were written with 5"
    ):
        lr.held_out_parts(config, {"folds": 5})


def test_lr_weights_have_a_row_a_feature_with_its_value(spark: SparkSession) -> None:
    field_map = FieldMap((FieldInfo("site", "categorical", 3), FieldInfo("age", "continuous", 2)))
    levels = [
        ("site", 0, "(missing)", 2),
        ("site", 1, "(other)", 0),
        ("site", 2, "a", 8),
        ("age", 0, "(missing)", 1),
        ("age", 1, "(value)", 9),
    ]
    levels_df = spark.createDataFrame(levels, "field string, index int, value string, count long")
    fit = lr.LrFit(np.array([0.5, 0.0, -1.0, 0.25, 2.0]), 0.1, 1e-5, (0.7, 0.6), 1, 1.0)
    weights_df = lr.lr_weights_df(spark, fit, levels_df, field_map)
    assert weights_df.columns == ["field", "value", "index", "count", "weight"]
    found = {
        (r["field"], r["index"]): (r["value"], r["count"], r["weight"])
        for r in weights_df.collect()
    }
    assert found == {
        ("site", 0): ("(missing)", 2, 0.5),
        ("site", 1): ("(other)", 0, 0.0),
        ("site", 2): ("a", 8, -1.0),
        ("age", 0): ("(missing)", 1, 0.25),
        ("age", 1): ("(value)", 9, 2.0),
    }


def test_importance_is_the_spread_of_what_a_field_adds(spark: SparkSession) -> None:
    rows = [
        ("even", 0, "x", 5, 3.0),
        ("even", 1, "y", 5, 1.0),  # adds 3 or 1, half the rows each: sd 1
        ("rare", 0, "x", 9, 0.0),
        ("rare", 1, "y", 1, 5.0),  # mean .5, variance .9 * .25 + .1 * 20.25 = 2.25
        ("same", 0, "x", 4, 7.0),
        ("same", 1, "y", 6, 7.0),  # adds the same to all
        ("age", 0, "(missing)", 3, 9.0),
        ("age", 1, "(value)", 7, -0.5),  # a standardised value has sd 1
    ]
    schema = "field string, index int, value string, count long, weight double"
    found = lr.field_importance_df(spark.createDataFrame(rows, schema)).collect()
    assert [(r["field"], r["features"]) for r in found] == [
        ("rare", 2),
        ("even", 2),
        ("age", 2),
        ("same", 2),
    ]
    assert [r["importance"] for r in found] == pytest.approx([1.5, 1, 0.5, 0], abs=1e-12)


@pytest.fixture(scope="module")
def flights(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, FieldMap, float]:
    """The flights up to LR, by the stages that everyone runs; and LR's AUC on the test rows."""
    workspace = tmp_path_factory.mktemp("flights")
    config = config_file.load(FLIGHTS, [f"workspace={workspace}", "systems=[lr]", "lr.l2=1e-4"])
    for stage in ("ingest", "features", "train_lr"):
        pipeline.run_stage(stage, spark, config)
    field_map = read_field_map(config)
    scores_df = score.shard_scores_df(
        spark, config, field_map, {"lr": workspace / "models/lr"}, "test"
    )
    return config, field_map, metrics.exact_auc(scores_df)


@pytest.mark.slow
def test_the_flights_auc_is_scikit_learns_on_the_same_columns(
    flights: tuple[Config, FieldMap, float],
) -> None:
    config, field_map, auc = flights
    x, y = matrix_of(config, field_map, "train")
    manifest = json.loads((config.workspace_path / "shards" / "manifest.json").read_text())
    assert x.shape == (manifest["splits"]["train"]["rows"], field_map.d)
    theirs = ScikitLearnLr(C=1 / (x.shape[0] * config.lr.l2[0]), max_iter=200).fit(x, y)
    x_test, y_test = matrix_of(config, field_map, "test")
    their_auc = roc_auc_score(y_test, theirs.decision_function(x_test))
    print(f"AUC of LR on the flights: MLlib {auc:.5f}, scikit-learn {their_auc:.5f}")
    assert auc == pytest.approx(their_auc, abs=0.002)


def columns_of(
    raw: pd.DataFrame, train: pd.Series, config: Config
) -> tuple[pd.DataFrame, list[str]]:
    """Encode raw rows with pandas alone: texts to be one-hot, and the names of the numbers."""
    made: dict[str, pd.Series] = {}
    numbers = []
    for field in config.fields:
        if field.kind == "crossed":
            made[field.name] = made[field.of[0]] + " & " + made[field.of[1]]
        elif field.kind == "continuous":
            made[field.name] = raw[field.column].fillna(raw[field.column][train].mean())
            numbers.append(field.name)
            continue
        elif isinstance(field, Bucketed):
            x = raw[field.column]
            made[field.name] = pd.cut(x, edges_of(field, x[train].dropna())).astype(str)
        else:
            made[field.name] = raw[field.column].astype(str)
        if field.kind in ("categorical", "crossed"):
            seen = made[field.name][train].value_counts()
            rare = ~made[field.name].isin(seen[seen >= field.min_count].index)
            made[field.name] = made[field.name].mask(rare, "(other)")
    return pd.DataFrame(made), numbers


def edges_of(field: Bucketed, x: pd.Series) -> list[float]:
    inner: Iterable[float] = field.cut_points
    if field.by == "quantile":
        inner = x.quantile(np.arange(1, field.buckets) / field.buckets)
    elif field.by == "uniform":
        inner = np.linspace(x.min(), x.max(), field.buckets + 1)[1:-1]
    elif field.by == "log_squared":
        inner = np.exp(np.sqrt(np.arange(1, np.log(x.max()) ** 2)))
    return [-np.inf, *sorted(set(inner)), np.inf]


@pytest.mark.slow
def test_the_flights_auc_is_that_of_an_lr_made_with_pandas_and_scikit_learn_alone(
    spark: SparkSession, flights: tuple[Config, FieldMap, float]
) -> None:
    config, _, auc = flights
    raw_df = tables.read(spark, config, "raw")
    raw = raw_df.withColumn("split", ingest.split_column(config)).drop("row_id").toPandas()
    train, test = raw["split"] == "train", raw["split"] == "test"
    columns, numbers = columns_of(raw, train, config)
    one_hot = OneHotEncoder(handle_unknown="ignore")
    scaler = StandardScaler()
    x_train = sp.hstack(
        [
            one_hot.fit_transform(columns[train].drop(columns=numbers)),
            sp.csr_matrix(scaler.fit_transform(columns.loc[train, numbers])),
        ]
    ).tocsr()
    x_test = sp.hstack(
        [
            one_hot.transform(columns[test].drop(columns=numbers)),
            sp.csr_matrix(scaler.transform(columns.loc[test, numbers])),
        ]
    ).tocsr()
    late = raw["arr_delay"] > 15
    theirs = ScikitLearnLr(C=1 / (train.sum() * config.lr.l2[0]), max_iter=200)
    theirs.fit(x_train, late[train])
    their_auc = roc_auc_score(late[test], theirs.decision_function(x_test))
    print(f"AUC of LR on the flights: ours {auc:.5f}, from raw rows without us {their_auc:.5f}")
    assert auc == pytest.approx(their_auc, abs=0.002)


@pytest.mark.slow
def test_the_flights_shards_hold_the_values_of_raw(
    spark: SparkSession, flights: tuple[Config, FieldMap, float]
) -> None:
    config, field_map, _ = flights
    levels_df = tables.read(spark, config, "vocabulary").where("field = 'carrier'")
    names = {row["index"]: row["value"] for row in levels_df.collect()}
    shards_df = read_shards(spark, config, "test").select("row_id", "carrier", "label")
    raw_df = tables.read(spark, config, "raw").withColumn("split", ingest.split_column(config))
    raw_df = raw_df.where("split = 'test'").select(
        "row_id", F.col("carrier").alias("value"), (F.col("arr_delay") > 15).alias("late")
    )
    # Flights of equal row id differ in nothing that is compared here.
    pairs_df = shards_df.join(raw_df.dropDuplicates(["row_id"]), "row_id")
    rows = pairs_df.groupBy("carrier", "value", "label", "late").count().collect()
    assert sum(row["count"] for row in rows) == shards_df.count()
    assert len({row["value"] for row in rows}) > 10
    for row in rows:
        assert names[row["carrier"]] == row["value"]
        assert row["label"] == float(row["late"])
    assert field_map["carrier"].size == len(names)
