"""What is seen of a table becomes a commented config that loads, and that runs unedited."""

import csv
import datetime
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import environment

from lc_spark import config_file
from lc_spark.errors import LcSparkError
from lc_spark.init import config_text, propose
from lc_spark.init.columns import ColumnProfile
from lc_spark.init.leaks import Alone
from lc_spark.init.profile import Day, Label, Profile

BIN = Path(sys.executable).parent
LABEL = Label("clicked", "clicked", "1", "0", 1_000, 3_900, 100)
FIRST = datetime.date(2024, 1, 1)


def text(name: str, distinct: int = 7, auc: float = 0.6, missing: int = 0) -> ColumnProfile:
    return ColumnProfile(name, "string", "text", missing, distinct, alone=Alone(auc, 0.9))


def number(name: str, distinct: int, low: float, high: float) -> ColumnProfile:
    quantiles = tuple(low + (high - low) * i / 100 for i in range(1, 100))
    return ColumnProfile(
        name, "double", "number", 0, distinct, low=low, high=high, quantiles=quantiles
    )


def table(*columns: ColumnProfile, days: int = 0, rows: int = 5_000) -> Profile:
    found = [Day(FIRST + datetime.timedelta(days=i), rows // days, 10) for i in range(days)]
    date = "day" if days else None
    dates = [ColumnProfile("day", "date", "date", 0, days)] if days else []
    return Profile(rows, 0, LABEL, (*columns, *dates), date, tuple(found))


def chosen(column: ColumnProfile, rows: int = 5_000) -> propose.Choice:
    return propose.choices(table(column, rows=rows))[0]


def written(profile: Profile, path: Path) -> str:
    content = config_text.yaml_text(
        profile, propose.choices(profile), "raw/clicks.csv", "csv", "clicks"
    )
    config_text.write(content, path)
    return content


LONG_TAIL = replace(number("visits", 400, 0, 9e4), quantiles=(0.0,) * 60 + (500.0,) * 39)


@pytest.mark.parametrize(
    ("column", "entry"),
    [
        (text("site"), "{name: site, kind: categorical}"),
        (text("site", 900), "{name: site, kind: categorical, min_count: 2}"),
        (number("hour", 24, 0, 23), "{name: hour, kind: categorical}"),
        (number("itemId", 900, 0, 1e6), "{name: itemId, kind: categorical, min_count: 2}"),
        (number("age", 70, 18, 90), "{name: age, kind: bucketed, buckets: 10}"),
        (LONG_TAIL, "{name: visits, kind: bucketed, by: log_squared}"),
        (
            replace(number("x", 4_000, -3, 3), fractions=True),
            "{name: x, kind: continuous}",
        ),
        (
            replace(number("price", 9, 0, 4), fractions=True),
            "{name: price, kind: bucketed, buckets: 9}",
        ),
        (
            replace(number("rate", 30, 0, 4), type="decimal(9,2)"),
            "{name: rate, kind: bucketed, buckets: 10}",
        ),
        (
            replace(text("tags", 50), delimiter="|", values=5, most_values=3),
            '{name: tags, kind: multivalued, delimiter: "|", max_values: 3}',
        ),
        (text("user.age"), "{name: user_age, column: user.age, kind: categorical}"),
        (text("class"), "{name: class_column, column: class, kind: categorical}"),
        (text("fold"), "{name: fold_column, column: fold, kind: categorical}"),
        (text("_hidden"), "{name: hidden, column: _hidden, kind: categorical}"),
        (text("7 days"), '{name: column_7_days, column: "7 days", kind: categorical}'),
        (text("Höhe"), '{name: Hohe, column: "Höhe", kind: categorical}'),
    ],
)
def test_the_kind_and_name_that_suit_a_column(
    column: ColumnProfile, entry: str, tmp_path: Path
) -> None:
    content = written(table(column), tmp_path / "clicks.yaml")
    assert f"  - {entry} " in content


@pytest.mark.parametrize(
    ("column", "left_out", "warned"),
    [
        (text("same", 1), "constant", False),
        (text("empty", 0, missing=5_000), "always missing", False),
        (replace(text("request", 5_000), unique=True), "another value in every row", True),
        (text("comment", 4_900), "nearly every row has another value", True),
        (text("refund", auc=0.999), "alone it gives AUC 0.999", True),
        (replace(text("paid"), alone=Alone(0.97, 0.01)), "alone it gives AUC 0.970", True),
        (text("row_id"), "keeps this name", False),
        (ColumnProfile("born", "date", "date", 0, 900), "a date", False),
        (ColumnProfile("place", "map<int,int>", "other", 0, 0), "no kind of field takes", False),
    ],
)
def test_a_column_is_left_out_with_the_reason(
    column: ColumnProfile, left_out: str, warned: bool
) -> None:
    choice = chosen(column)
    assert left_out in choice.left_out
    assert (choice.warning == choice.left_out) == warned


def test_a_suspicious_column_stays_with_a_warning() -> None:
    choice = chosen(text("hint", auc=0.95))
    assert not choice.left_out
    assert "AUC 0.950" in choice.warning


def test_columns_of_like_names_get_names_of_their_own() -> None:
    profile = table(text("a b"), text("a.b"), text("A_B"))
    assert [c.name for c in propose.choices(profile)] == ["a_b", "a_b_2", "A_B_3"]


def test_hostile_text_stays_in_its_place(tmp_path: Path) -> None:
    name = "a: #'\"\\ {x}\n- \u2028\x85\U0001f600 \x7f"
    profile = table(text(name), text("other\n\x07", 1), text("no"))
    profile = replace(
        profile, label=replace(LABEL, positive="1\nname: x", expression="`a\\'\n: #`")
    )
    content = written(profile, tmp_path / "clicks.yaml")
    config = config_file.load(tmp_path / "clicks.yaml")
    assert [f.column for f in config.fields if f.kind != "crossed"] == [name, "no"]
    assert config.label == "`a\\'\n: #`"
    assert config.name == "clicks"
    assert all(character.isprintable() or character == "\n" for character in content)


def test_dates_split_by_day_and_the_rejected_rows_fit(tmp_path: Path) -> None:
    profile = replace(table(text("site"), days=50), corrupt=200)
    content = written(profile, tmp_path / "clicks.yaml")
    config = config_file.load(tmp_path / "clicks.yaml")
    assert config.source.date == "day"
    assert config.split.by == "date"
    assert config.split.valid_from == FIRST + datetime.timedelta(days=35)
    assert config.split.test_from == FIRST + datetime.timedelta(days=40)
    assert config.source.max_rejected == 0.09
    assert "6.0 % of the rows are set aside: 100 without a label, 200 that do not parse" in content


@pytest.mark.parametrize(
    "days",
    [
        [(100, 10)] * 9,  # too few
        [(1, 0)] * 19 + [(981, 300)],  # nearly all rows in the last
        [(100, 10)] * 20 + [(100, 0)] * 10,  # no positive row to test on
    ],
)
def test_days_that_cannot_be_cut_leave_the_hash(days: list[tuple[int, int]]) -> None:
    found = [Day(FIRST + datetime.timedelta(days=i), n, p) for i, (n, p) in enumerate(days)]
    assert propose.date_split(tuple(found)) is None


def test_what_is_commented_out_can_be_taken_in(tmp_path: Path) -> None:
    profile = table(text("site"), text("page"), text("paid", auc=1.0), text("same", 1))
    content = written(profile, tmp_path / "clicks.yaml")
    assert "  # - {name: paid, kind: categorical} " in content
    taken = content.replace("# - ", "- ").replace("# features", "features")
    config_text.write(taken, tmp_path / "all.yaml")
    config = config_file.load(tmp_path / "all.yaml")
    assert [f.name for f in config.fields] == ["site", "page", "site_x_page", "paid", "same"]
    assert config.features.crosses == "auto"


def test_no_column_left_is_told(tmp_path: Path) -> None:
    with pytest.raises(LcSparkError, match=r"No column .* is left to learn from \(same: constant"):
        written(table(text("same", 1)), tmp_path / "clicks.yaml")


@pytest.mark.parametrize(
    ("rows", "ranks", "batch_size"), [(200, 1, 16), (50_000, 2, 32), (50_000_000, 2, 2048)]
)
def test_sizes_follow_the_rows(rows: int, ranks: int, batch_size: int) -> None:
    sizes = propose.sizes(rows, None)
    assert (sizes.ranks, sizes.batch_size) == (ranks, batch_size)
    assert sizes.steps >= 300 or sizes.epochs == 10


def test_the_format_is_guessed_by_the_names(tmp_path: Path) -> None:
    (tmp_path / "log" / "day=1").mkdir(parents=True)
    (tmp_path / "log" / "_SUCCESS").touch()
    (tmp_path / "log" / "day=1" / "part-0.snappy.parquet").touch()
    (tmp_path / "clicks.csv.gz").touch()
    (tmp_path / "clicks.txt").touch()
    assert config_text.guess_format(str(tmp_path / "log")) == "parquet"
    assert config_text.guess_format(str(tmp_path / "clicks.csv.gz")) == "csv"
    assert config_text.guess_format("s3a://logs/clicks.jsonl") == "json"
    with pytest.raises(LcSparkError, match="add --format"):
        config_text.guess_format(str(tmp_path / "clicks.txt"))
    with pytest.raises(LcSparkError, match="There is no file or folder"):
        config_text.guess_format(str(tmp_path / "clicks"))


def test_a_config_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_text.output_path(None, config_text.config_name("raw/2024 clicks.csv")) == Path(
        "table_2024_clicks.yaml"
    )
    (tmp_path / "conf").mkdir()
    assert config_text.output_path(None, "clicks") == Path("conf/clicks.yaml")
    (tmp_path / "conf" / "clicks.yaml").write_text("mine")
    with pytest.raises(LcSparkError, match="exists, and is not overwritten"):
        config_text.output_path(None, "clicks")


def made_up_log(path: Path) -> None:
    """5,000 rows: an id, days, mixed kinds, a leaking column, 1 % without a label."""
    chance = random.Random(11)
    header = ["request", "at", "user.age", "site name", "tags", "amount", "visits", "user"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "refund", "version", "class", "outcome"])
        for i in range(5_000):
            site, age = chance.randrange(9), chance.randint(18, 80)
            clicked = chance.random() < 0.1 + 0.05 * site + (0.2 if age < 40 else 0)
            tags = chance.sample(["red", "green", "blue", "black"], chance.randint(1, 3))
            outcome = "clicked" if clicked else "passed"
            writer.writerow(
                [
                    f"r{i:05d}",
                    f"{FIRST + datetime.timedelta(days=i // 80)} 12:{i % 60:02d}:00",
                    age,
                    f"site {site}",
                    "|".join(tags),
                    round(chance.gauss(0, 1), 4),
                    int(chance.expovariate(1) ** 4 * 3),
                    f"u{chance.randrange(900)}",
                    round(9 * chance.random(), 2) if clicked else "",
                    "v1",
                    chance.randint(1, 3),
                    "" if i % 100 == 0 else outcome,
                ]
            )


@pytest.mark.slow
def test_a_log_that_nobody_described_runs_unedited(tmp_path: Path) -> None:
    made_up_log(tmp_path / "log.csv")
    variables = environment() | {"COLUMNS": "120", "PATH": f"{BIN}:{os.environ['PATH']}"}

    def lc_spark(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "lc-spark"), *arguments],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )

    done = lc_spark("init", "log.csv", "--label", "outcome")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Next        lc-spark run log.yaml" in done.stdout
    assert "Warning     refund: alone it gives AUC 1.000" in done.stdout
    config = config_file.load(tmp_path / "log.yaml")
    assert config.source.row_id == ("request",)
    assert config.split.by == "date"
    assert {f.name: f.kind for f in config.fields} == {
        "user_age": "bucketed",
        "site_name": "categorical",
        "tags": "multivalued",
        "amount": "continuous",
        "visits": "bucketed",
        "user": "categorical",
        "class_column": "categorical",
    }
    again = lc_spark("init", "log.csv", "--label", "outcome")
    assert again.returncode == 1
    assert "log.yaml exists, and is not overwritten" in again.stderr
    finished = lc_spark("run", "log.yaml")
    assert "50 rejected" in finished.stderr, finished.stderr[-3000:]
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "lc_wd" in finished.stdout
