"""The synthetic click log is what its docstring says, and leaves each system something to find."""

import datetime
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from lc_spark import config_file, datasets, synthetic
from lc_spark.config import Config

CONF = Path(__file__).parent.parent / "conf"
TEST_FROM = datetime.date(2024, 4, 27)  # as in the configs
# What nobody knows before the click.
OUTCOME = {"clicked", "true_probability", "impression", "label", "row_id"}


@pytest.fixture(scope="module")
def log_df() -> pd.DataFrame:
    return synthetic.synthetic()


@pytest.fixture(scope="module")
def config() -> Config:
    return config_file.load(CONF / "synthetic.yaml")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "same", "other")]
    for file, seed in zip(files, (5, 5, 6), strict=True):
        synthetic.synthetic(rows=2_000, seed=seed).to_parquet(file, index=False)
    one, same, other = (file.read_bytes() for file in files)
    assert one == same != other


def test_columns_rows_and_days(log_df: pd.DataFrame) -> None:
    assert len(log_df) == 300_000
    assert log_df["impression"].is_unique
    assert log_df["date"].is_monotonic_increasing
    days = log_df["date"].unique()
    assert len(days) == 30
    assert (days[0], days[-1]) == (datetime.date(2024, 4, 1), datetime.date(2024, 4, 30))
    assert (pd.to_datetime(log_df["date"]).dt.day_name().str[:3] == log_df["weekday"]).all()
    distinct = log_df.nunique()
    assert distinct["user_id"] > 3_900
    assert distinct["item_id"] > 2_900
    assert dict(distinct[["segment", "age_group", "country", "category", "device"]]) == {
        **{"segment": 8, "age_group": 6, "country": 25, "category": 20, "device": 4}
    }
    interests = [text.split("|") for text in log_df["interests"].dropna()]
    assert {len(names) for names in interests} == {1, 2, 3, 4}
    assert all(len(set(names)) == len(names) for names in interests)


def test_popularity_has_a_head_and_a_long_tail(log_df: pd.DataFrame) -> None:
    for name in ("user_id", "item_id"):
        counts = log_df[name].value_counts()
        assert counts.iloc[: len(counts) // 10].sum() > 0.3 * len(log_df), name
        assert counts.median() < 0.7 * counts.mean(), name


def test_missing_values_and_what_they_say(log_df: pd.DataFrame) -> None:
    missing = log_df.isna().mean()
    assert set(missing[missing > 0].index) == {
        *("age_group", "interests", "days_since_visit", "brand", "price", "rating")
    }
    expected = {"brand": 0.05, "price": 0.02, "days_since_visit": 0.12, "interests": 1 / 16}
    for name, share in expected.items():
        assert missing[name] == pytest.approx(share, abs=0.003), name
    assert (log_df["rating"].isna() == (log_df["item_age_days"] < 5)).all()
    truth = log_df["true_probability"]
    for name, low, high in (
        ("brand", 0.97, 1.03),  # lost at random
        ("price", 0.97, 1.03),
        ("days_since_visit", 0.5, 0.85),  # a first visit
    ):
        ratio = truth[log_df[name].isna()].mean() / truth[log_df[name].notna()].mean()
        assert low < ratio < high, name


def test_labels_come_from_the_true_probability(log_df: pd.DataFrame) -> None:
    truth, clicked = log_df["true_probability"], log_df["clicked"]
    assert set(clicked) == {0, 1}
    assert truth.between(0, 1, inclusive="neither").all()
    assert truth.mean() == pytest.approx(0.17, abs=1e-5)
    deciles = log_df.assign(decile=pd.qcut(truth, 10, labels=False)).groupby("decile")
    error = np.sqrt(deciles["true_probability"].apply(lambda p: (p * (1 - p)).sum()))
    z = (deciles["clicked"].sum() - deciles["true_probability"].sum()) / error
    assert len(z) == 10
    assert z.abs().max() < 4


def auc_of_lr(log_df: pd.DataFrame, names: list[str], crosses: set[tuple[str, str]]) -> float:
    """Return the AUC on the test days of LR fitted on the rest, its numbers in deciles."""
    texts_df = pd.DataFrame(
        {
            name: log_df[name].fillna("missing")
            if log_df[name].dtype == object
            else pd.qcut(log_df[name], 10, labels=False, duplicates="drop").fillna(-1).astype(str)
            for name in names
        }
    )
    for one, other in crosses:
        texts_df[f"{one}_x_{other}"] = texts_df[one] + " " + texts_df[other]
    encoder = OneHotEncoder(min_frequency=3, handle_unknown="infrequent_if_exist")
    is_test = (log_df["date"] >= TEST_FROM).to_numpy()
    clicked = log_df["clicked"].to_numpy()
    x = encoder.fit(texts_df[~is_test]).transform(texts_df)
    lr = LogisticRegression(C=0.3, max_iter=200).fit(x[~is_test], clicked[~is_test])
    return float(roc_auc_score(clicked[is_test], lr.decision_function(x[is_test])))


@pytest.mark.slow
def test_additive_lr_stays_far_below_the_truth_and_crosses_bring_it_nearer(
    log_df: pd.DataFrame, config: Config
) -> None:
    rows_df = log_df[log_df["date"] >= datetime.date(2024, 4, 11)].reset_index(drop=True)
    single = [f.column for f in config.fields if f.kind in ("categorical", "bucketed")]
    test_df = rows_df[rows_df["date"] >= TEST_FROM]
    best = roc_auc_score(test_df["clicked"], test_df["true_probability"])
    additive = auc_of_lr(rows_df, single, set())
    crossed = auc_of_lr(rows_df, single, set(synthetic.PAIRS))
    assert 0.78 < best < 0.86
    assert 0.65 < additive < best - 0.08
    assert additive + 0.02 < crossed < best - 0.04


def test_pairs_have_no_additive_part() -> None:
    world = np.random.default_rng(1)
    effects = synthetic._Effects(world, (24, 4), 0.5)
    hour, device = (np.array(c) for c in zip(*itertools.product(range(24), range(4)), strict=True))
    for day in (0, 29):
        pairs = effects.of(np.full(96, day), hour, device).reshape(24, 4)
        assert np.abs(pairs.mean(axis=0)).max() < 1e-12
        assert np.abs(pairs.mean(axis=1)).max() < 1e-12
    assert effects.first.std() == pytest.approx(0.5)


def test_the_log_drifts(log_df: pd.DataFrame) -> None:
    week = (pd.to_datetime(log_df["date"]) - pd.Timestamp("2024-04-01")).dt.days // 7
    first_df, last_df = log_df[week == 0], log_df[week == 3]
    new = ~last_df["item_id"].isin(log_df.loc[week < 3, "item_id"])
    assert 0.02 < new.mean() < 0.3
    assert (last_df.loc[new, "item_age_days"] < 7).mean() > 0.9
    phone = [(part_df["device"] == "phone").mean() for part_df in (first_df, last_df)]
    assert phone[1] > phone[0] + 0.05
    # Effects move: the rates of placements, which have many rows each, do not keep their ratio.
    first, last = (
        part_df.groupby("placement")["true_probability"].mean() for part_df in (first_df, last_df)
    )
    ratio = last / first
    assert ratio.max() > 1.1 * ratio.min()


@pytest.mark.parametrize("name", ["synthetic", "synthetic_no_crosses"])
def test_no_field_knows_the_outcome(name: str, log_df: pd.DataFrame) -> None:
    made = config_file.load(CONF / f"{name}.yaml")
    columns = {field.column for field in made.fields if field.kind != "crossed"}
    assert len(columns) == 18
    assert not columns & OUTCOME
    assert columns | {"clicked", "true_probability", "date", "impression"} == set(log_df.columns)
    assert made.evaluation.truth == "true_probability"


def test_two_configs_differ_in_the_crosses_alone(config: Config) -> None:
    crossed = config.model_dump()
    single = config_file.load(CONF / "synthetic_no_crosses.yaml").model_dump()
    assert config.split.model_dump()["test_from"] == TEST_FROM
    differing = {key for key, value in crossed.items() if value != single[key]}
    assert differing == {"name", "workspace", "fields"}
    pairs = [field for field in crossed["fields"] if field["kind"] == "crossed"]
    assert [field for field in crossed["fields"] if field not in pairs] == list(single["fields"])
    assert set(synthetic.PAIRS) < {field["of"] for field in pairs}


def test_materialize_writes_the_log(tmp_path: Path, log_df: pd.DataFrame) -> None:
    path = datasets.materialize("synthetic", tmp_path / "source")
    assert [p.name for p in path.parent.iterdir()] == ["synthetic.parquet"]
    pd.testing.assert_frame_equal(pd.read_parquet(str(path)), log_df)
