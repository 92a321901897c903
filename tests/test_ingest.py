"""Source rows become raw or rejected, every one, and a second run changes nothing."""

import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ConfigMaker
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.testing import assertDataFrameEqual

from lc_spark import ingest as ingest_module
from lc_spark import tables
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.ingest import Ingested, ingest, split_column

DAY_1, DAY_2 = datetime.date(2013, 1, 1), datetime.date(2013, 1, 2)
PRICE = {"name": "price", "kind": "continuous"}
SITE = {"name": "site", "kind": "categorical"}


class Log:
    """A workspace, and a folder to put source files in."""

    def __init__(self, spark: SparkSession, make_config: ConfigMaker, folder: Path) -> None:
        self.spark, self.make_config, self.folder = spark, make_config, folder

    def config(self, source: dict[str, Any], **settings: Any) -> Config:
        source = {"max_rejected": 0.9, **source}
        own = {"workspace": str(self.folder / "workspace"), "fields": [SITE]}
        return self.make_config({**own, "source": source, **settings})

    def text(self, name: str, content: str) -> str:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(content, encoding="utf-8")
        return str(self.folder / name)

    def parquet(self, name: str, columns: dict[str, list[Any]]) -> str:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(columns).to_parquet(self.folder / name)
        return str(self.folder / name)

    def raw(self, config: Config) -> DataFrame:
        return tables.read(self.spark, config, "raw")

    def rejected(self, config: Config) -> list[tuple[str, str]]:
        rows = tables.read(self.spark, config, "rejected").orderBy("reason", "record").collect()
        return [(row["reason"], row["record"]) for row in rows]


@pytest.fixture
def log(spark: SparkSession, make_config: ConfigMaker, tmp_path: Path) -> Log:
    return Log(spark, make_config, tmp_path)


def counts(made: Ingested) -> tuple[int, int, dict[str, int]]:
    assert made.source_rows == made.raw_rows + sum(made.rejected.values())
    return made.source_rows, made.raw_rows, made.rejected


def test_csv_rows_that_do_not_fit_are_set_aside_with_the_reason(log: Log) -> None:
    lines = [
        "site,price,label",
        "a,1.5,1",
        "a,cheap,0",  # a number that is text
        "b",  # too few columns
        "c,2,0,9",  # too many
        '"d,2,0',  # a quote that never ends
        "é; ü,,0",
        ",3,",
        "f,4,2",
        "g,5,yes",
        "h,6,maybe",
    ]
    path = log.text("rows.csv", "\n".join(lines) + "\n")
    config = log.config({"path": path, "format": "csv"}, fields=[SITE, PRICE])
    assert counts(ingest(log.spark, config)) == (
        10,
        3,
        {
            "the line does not parse": 3,
            "no label": 2,
            "column price is not double": 1,
            "label is not 0 or 1": 1,
        },
    )
    rows = log.raw(config).orderBy("price").select("site", "price", "label", "date").collect()
    no_date = datetime.date(1970, 1, 1)
    assert [tuple(row) for row in rows] == [
        ("é; ü", None, 0.0, no_date),
        ("a", 1.5, 1.0, no_date),
        ("g", 5.0, 1.0, no_date),
    ]
    assert log.rejected(config) == [
        ("column price is not double", '{"site":"a","price":"cheap","label":"0"}'),
        ("label is not 0 or 1", '{"site":"f","price":"4","label":"2"}'),
        ("no label", '{"price":"3"}'),
        ("no label", '{"site":"h","price":"6","label":"maybe"}'),
        ("the line does not parse", '"d,2,0'),
        ("the line does not parse", "b"),
        ("the line does not parse", "c,2,0,9"),
    ]


def test_json_lines_that_do_not_parse_are_set_aside(log: Log) -> None:
    lines = [
        '{"site": "a", "label": 1, "tags": ["x", "y"]}',
        '{"site": "b", "label":',
        '{"label": 0}',
        "",
        '{"site": "c", "label": null}',
    ]
    path = log.text("rows.json", "\n".join(lines) + "\n")
    tags = {"name": "tags", "kind": "multivalued"}
    config = log.config({"path": path, "format": "json"}, fields=[SITE, tags])
    made = ingest(log.spark, config)
    assert counts(made) == (4, 2, {"no label": 1, "the line does not parse": 1})
    expected = [Row(site="a", tags=["x", "y"], label=1.0), Row(site=None, tags=None, label=0.0)]
    schema = "site string, tags array<string>, label float"
    assertDataFrameEqual(
        log.raw(config).select("site", "tags", "label"), log.spark.createDataFrame(expected, schema)
    )


def test_a_second_run_leaves_the_same_tables(log: Log) -> None:
    days = ["2013-01-01", "2013-01-02", "2013-01-02", None]
    columns: dict[str, list[Any]] = {
        "site": ["a", "b", "c", "d"],
        "day": days,
        "clicked": [1, 0, 1, 0],
    }
    source = {"path": log.parquet("rows.parquet", columns), "date": "day"}
    config = log.config(source, label="clicked = 1")
    first = ingest(log.spark, config)
    assert counts(first) == (4, 3, {"no date": 1})
    files = Path(config.workspace, "tables", "raw").glob("date=*/*.parquet")
    assert [file.parent.name[-10:] for file in sorted(files)] == ["2013-01-01", "2013-01-02"]
    raw_rows, rejected_rows = log.raw(config).collect(), log.rejected(config)
    second = ingest(log.spark, config)
    assert counts(second) == counts(first)
    assert second.raw_version == first.raw_version + 1
    assertDataFrameEqual(log.raw(config).collect(), raw_rows)
    assert log.rejected(config) == rejected_rows
    day = ingest(log.spark, config, DAY_2)
    assert (day.source_rows, day.raw_rows) == (3, 2), "rows without a day are looked at every day"
    assertDataFrameEqual(log.raw(config).collect(), raw_rows)


def test_a_day_replaces_only_itself_in_both_tables(log: Log) -> None:
    source = {"path": str(log.folder / "{date}.json"), "format": "json", "date": "day"}
    config = log.config({**source, "reject": {"robot": "site = 'robot'"}})
    rows = '{{"site": {}, "label": 0, "day": "{}"}}\n'.format
    log.text("2013-01-01.json", rows('"a"', DAY_1) + rows('"robot"', DAY_1))
    made = ingest(log.spark, config, DAY_1)
    assert counts(made) == (2, 1, {"robot": 1})
    # Another day has numbers for sites, a row of the day before, and a column that is new.
    extra = f'{{"site": 5, "label": 1, "day": "{DAY_2}", "page": "p"}}\n'
    log.text("2013-01-02.json", rows("7", DAY_2) + rows("8", DAY_1) + extra)
    made = ingest(log.spark, config, DAY_2)
    assert counts(made) == (3, 2, {"date of another day": 1})
    first_day = log.raw(config).where(F.col("date") == DAY_1).collect()
    log.text("2013-01-02.json", rows('"new"', DAY_2))
    assert counts(ingest(log.spark, config, DAY_2)) == (1, 1, {})
    table = log.raw(config).select("site", "date", "page").orderBy("date").collect()
    assert [tuple(row) for row in table] == [("a", DAY_1, None), ("new", DAY_2, None)]
    assert log.raw(config).where(F.col("date") == DAY_1).collect() == first_day
    assert [reason for reason, _ in log.rejected(config)] == ["robot"]
    with pytest.raises(LcSparkError, match=r"cannot read .*2013-01-03.json' as json"):
        ingest(log.spark, config, datetime.date(2013, 1, 3))


def test_days_that_lie_about_come_together_unless_the_files_are_large(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [str(datetime.date(2013, 1, day)) for day in range(1, 7)]
    for number in range(5):
        rows: dict[str, list[Any]] = {"day": days, "site": list("abcdef"), "label": [0, 1] * 3}
        log.parquet(f"mixed/{number}.parquet", rows)  # every day in every file
    for number, day in enumerate(days):
        rows = {"day": [day] * 5, "site": list("abcde"), "label": [1, 0, 0, 0, 1]}
        log.parquet(f"in_order/{number}.parquet", rows)
    key = "spark.sql.files.maxPartitionBytes"
    log.spark.conf.set(key, "4m")  # what Spark takes the opening of a file for: a task a file
    try:
        files = {}
        for name, file_rows in (("mixed", 1000), ("in_order", 1000), ("large", 1)):
            monkeypatch.setattr(ingest_module, "FILE_ROWS", file_rows)
            path = str(log.folder / ("in_order" if name == "in_order" else "mixed"))
            made = log.config(
                {"path": path, "date": "day"}, workspace=str(log.folder / f"workspace_{name}")
            )
            assert ingest(log.spark, made).raw_rows == 30
            files[name] = len(log.raw(made).inputFiles())
    finally:
        log.spark.conf.unset(key)
    assert files == {"mixed": 6, "in_order": 6, "large": 30}


def test_too_many_rejected_or_no_rows_leave_raw_as_it_was(log: Log) -> None:
    columns: dict[str, list[Any]] = {
        "site": ["a", "b"],
        "label": [0, 1],
        "day": ["2013-01-01", "2013-01-01"],
    }
    source = {"path": log.parquet("rows.parquet", columns), "date": "day", "max_rejected": 0.4}
    config = log.config(source)
    version = ingest(log.spark, config).raw_version
    strict = log.config(source | {"reject": {"a robot": "site = 'b'"}})
    with pytest.raises(LcSparkError, match=r"1 of 2 rows were rejected \(a robot: 1\).*= 0.4"):
        ingest(log.spark, strict)
    assert tables.version(log.spark, config, "raw") == version
    assert [reason for reason, _ in log.rejected(config)] == ["a robot"], "there to be looked at"
    with pytest.raises(LcSparkError, match="has no rows"):
        ingest(log.spark, config, DAY_2)
    assert tables.version(log.spark, config, "raw") == version
    with pytest.raises(LcSparkError, match="2 of 2 rows were rejected"):
        ingest(log.spark, log.config(source | {"reject": {"all": "true"}}))
    assert tables.version(log.spark, config, "raw") == version


def test_columns_of_any_name_and_columns_named_as_raw_names_its_own(log: Log) -> None:
    path = str(log.folder / "delta")
    columns = "`user id` string, `x.y` double, Label int, date string, row_id string, __n int"
    rows = [("a", 1.5, 1, "2013-01-01", "r1", 5), ("b", None, 0, "2013-01-02", "r2", 6)]
    rows_df = log.spark.createDataFrame(rows, columns)
    writer = rows_df.write.format("delta").option("delta.columnMapping.mode", "name")
    writer.save(path)
    fields = [
        {"name": "user", "column": "user id", "kind": "categorical"},
        {"name": "xy", "column": "x.y", "kind": "continuous"},
    ]
    source = {"path": path, "format": "delta", "date": "date", "row_id": ["row_id"]}
    config = log.config(source, label="Label", fields=fields)
    assert counts(ingest(log.spark, config)) == (2, 2, {})
    raw_df = log.raw(config).orderBy("date")
    assert raw_df.columns == ["user id", "x.y", "__n", "row_id", "label", "date"]
    found = raw_df.select("`user id`", "`x.y`", "label", "date").collect()
    assert [tuple(r) for r in found] == [("a", 1.5, 1.0, DAY_1), ("b", None, 0.0, DAY_2)]
    hashes = raw_df.select("row_id").collect()
    expected = log.spark.sql("SELECT xxhash64('r1'), xxhash64('r2')").collect()[0]
    assert [row["row_id"] for row in hashes] == list(expected)
    # The day's rows of a table with such names can be replaced like any other.
    assert counts(ingest(log.spark, config, DAY_2)) == (1, 1, {})
    assertDataFrameEqual(log.raw(config).orderBy("date"), raw_df)


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ({"path": "no/such/file"}, {}, "cannot read 'no/such/file' as parquet"),
        ({"path": "no/such/table", "format": "delta"}, {}, "no Delta table at 'no/such/table'"),
        ({"derive": {"x": "sit || 'a'"}}, {}, "source.derive cannot be evaluated.*sit"),
        ({"derive": {"Site": "1"}}, {}, "source.derive makes 'Site', but the source has 'site'"),
        ({"types": {"sit": "string"}}, {}, "source.types names 'sit', which the table lacks"),
        ({"types": {"site": "integr"}}, {}, "source.types cannot be applied.*INTEGR"),
        ({}, {"label": "clicked >"}, "label or source.reject cannot be evaluated.*yntax"),
        ({}, {"label": "lable"}, "cannot be evaluated.*lable"),
        ({"date": "dya"}, {}, "cannot be evaluated.*dya"),
        ({"row_id": ["idd"]}, {}, "cannot be evaluated.*idd"),
        ({"reject": {"old": "dya < 3"}}, {}, "cannot be evaluated.*dya"),
        (
            {},
            {"fields": [{"name": "sit", "kind": "categorical"}]},
            "Field 'sit' reads column 'sit', which the table lacks. Did you mean 'site'",
        ),
        ({}, {"fields": [{**SITE, "kind": "continuous"}]}, "column site is not double"),
        (
            {},
            {"fields": [{"name": "target", "column": "label", "kind": "categorical"}]},
            "Field 'target' reads column 'label', a name that the table 'raw' keeps for its own",
        ),
    ],
)
def test_a_source_that_cannot_be_used_is_named(
    log: Log, source: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    path = log.parquet("rows.parquet", {"site": ["a", "b"], "label": [0, 1]})
    with pytest.raises(LcSparkError, match=said):
        ingest(log.spark, log.config({"path": path, **source}, **settings))


def test_one_day_needs_a_date_column(log: Log) -> None:
    path = log.parquet("rows.parquet", {"site": ["a", "b"], "label": [0, 1]})
    with pytest.raises(LcSparkError, match=r"source\.date must say"):
        ingest(log.spark, log.config({"path": path}), DAY_1)


def test_the_row_id_is_stable_and_tells_places_of_nulls_apart(log: Log) -> None:
    sites, pages = ["a", None, "ab", "a"], [None, "a", "", "b"]
    path = log.parquet("rows.parquet", {"site": sites, "page": pages, "label": [0, 1, 0, 1]})
    by_id = log.config({"path": path, "row_id": ["site", "page"]})
    ingest(log.spark, by_id)
    ids = {(r["site"], r["page"]): r["row_id"] for r in log.raw(by_id).collect()}
    assert len(set(ids.values())) == 4
    # The same rows in another order and file format have the same ids.
    rows_df = log.raw(by_id).orderBy(F.desc("row_id")).select("site", "page", "label")
    rows_df.write.json(str(log.folder / "json"))
    again = log.config(
        {"path": str(log.folder / "json"), "format": "json", "row_id": ["site", "page"]}
    )
    ingest(log.spark, again)
    assert {(r["site"], r["page"]): r["row_id"] for r in log.raw(again).collect()} == ids


def test_files_without_header_and_with_another_delimiter_are_read(log: Log) -> None:
    path = log.text("rows.dat", '1::"A" b, c::2.5\n0::::\n1::d\n')
    how = {"format": "csv", "delimiter": "::", "quote": "", "columns": ["clicked", "site", "price"]}
    config = log.config({"path": path, **how}, label="clicked = 1", fields=[SITE, PRICE])
    assert counts(ingest(log.spark, config)) == (3, 2, {"the line does not parse": 1})
    rows = log.raw(config).orderBy("label").select("clicked", "site", "price", "label").collect()
    assert [tuple(r) for r in rows] == [("0", None, None, 0.0), ("1", '"A" b, c', 2.5, 1.0)]


def test_quotes_within_quotes_are_written_twice(log: Log) -> None:
    path = log.text("rows.csv", 'site,label\n"a ""b"", c",1\n"C:\\",0\n')
    config = log.config({"path": path, "format": "csv"})
    assert counts(ingest(log.spark, config)) == (2, 2, {})
    sites = {row["site"] for row in log.raw(config).collect()}
    assert sites == {'a "b", c', "C:\\"}


def test_tables_are_joined_to_every_row(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    columns: dict[str, list[Any]] = {"user": [1, 2, None, 4], "site": ["a", "b", "a", "z"]}
    path = log.parquet("rows.parquet", columns | {"label": [0, 1, 1, 0]})
    users = log.text("users.csv", "1|30|x\n2||y\n4\n|9|z\n|8|z\n")
    users_table = {"path": users, "format": "csv", "delimiter": "|", "keys": ["user"]}
    sites = log.parquet("sites.parquet", {"site": ["a", "b"], "rank": [5, 6]})
    join = {
        "users": {**users_table, "columns": ["user", "age", "zip"]},
        "sites": {"path": sites, "keys": ["site"]},
    }
    age = {"name": "age", "kind": "continuous"}
    config = log.config({"path": path, "join": join}, fields=[SITE, age])
    assert counts(ingest(log.spark, config)) == (4, 4, {})
    # A user without a match, or missing, gets nulls; so does one whose line does not parse.
    found = log.raw(config).select("site", "age", "zip", "rank", "label").collect()
    assert {tuple(row) for row in found} == {
        ("a", 30.0, "x", 5, 0.0),
        ("b", None, "y", 6, 1.0),
        ("a", None, None, 5, 1.0),
        ("z", None, None, None, 0.0),
    }
    assert f"source.join.users: 1 lines of {users} do not parse" in caplog.text


@pytest.mark.parametrize(
    ("table", "keys", "said"),
    [
        ({"site": ["a", "b", "a"], "x": [1, 2, 3]}, ["site"], "has 1 values of site in more than"),
        ({"site": ["a"], "Label": [1]}, ["site"], "both have a column 'Label'"),
        ({"sites": ["a"]}, ["site"], "table.parquet' has no column 'site'.*mean 'sites'"),
        ({"site": ["a"], "x": [1]}, ["x"], "the source has no column 'x'"),
    ],
)
def test_a_table_that_cannot_be_joined_is_named(
    log: Log, table: dict[str, list[Any]], keys: list[str], said: str
) -> None:
    path = log.parquet("rows.parquet", {"site": ["a", "b"], "label": [0, 1]})
    join = {"t": {"path": log.parquet("table.parquet", table), "keys": keys}}
    with pytest.raises(LcSparkError, match=f"source.join.t: .*{said}"):
        ingest(log.spark, log.config({"path": path, "join": join}))


def test_derived_columns_come_after_types_and_serve_date_label_and_fields(log: Log) -> None:
    path = log.text("rows.csv", "site,n,at\na,9,13010105\nb,10,13010223\nc,?,13010223\n")
    derive = {
        "hour": "CAST(substring(at, 7, 2) AS INT)",
        "big": "n > 9",  # as text '9' is more than '10'
        "day": "to_date(substring(at, 1, 6), 'yyMMdd')",
    }
    source = {"path": path, "format": "csv", "types": {"n": "int"}, "derive": derive}
    hour = {"name": "hour", "kind": "bucketed"}
    config = log.config({**source, "date": "day"}, label="big", fields=[SITE, hour])
    assert counts(ingest(log.spark, config)) == (3, 2, {"column n is not int": 1})
    rows = log.raw(config).orderBy("date").select("site", "hour", "label", "date").collect()
    assert [tuple(row) for row in rows] == [("a", 5, 0.0, DAY_1), ("b", 23, 1.0, DAY_2)]
    assert log.rejected(config) == [
        ("column n is not int", '{"site":"c","n":"?","at":"13010223"}')
    ], "the record is the row as read"


def split_counts(df: DataFrame, config: Config) -> dict[str, int]:
    counted = df.groupBy(split_column(config).alias("split")).count().collect()
    return {row["split"]: row["count"] for row in counted}


def test_split_by_hash_gives_the_shares_and_the_same_rows_each_time(log: Log) -> None:
    raw_df = log.spark.range(40_000).select(F.xxhash64("id").alias("row_id"))
    config = log.config({"path": "x"}, split={"by": "hash", "valid": 0.1, "test": 0.2})
    found = split_counts(raw_df, config)
    assert sum(found.values()) == 40_000
    # Six standard deviations of a binomial share.
    assert found["test"] == pytest.approx(8_000, abs=480)
    assert found["valid"] == pytest.approx(4_000, abs=360)
    named_df = raw_df.select("row_id", split_column(config).alias("split"))
    other_df = raw_df.repartition(7).select("row_id", split_column(config).alias("split"))
    assert named_df.exceptAll(other_df).count() == 0
    reseeded = log.config({"path": "x"}, seed=8)
    assert named_df.where(F.col("split") != split_column(reseeded)).count() > 10_000


def test_split_by_date_cuts_at_the_given_days(log: Log) -> None:
    days = [datetime.date(2013, 11, d) for d in (1, 9, 10, 19, 20, 30)]
    raw_df = log.spark.createDataFrame([(day,) for day in days], "date date")
    split = {"by": "date", "valid_from": "2013-11-10", "test_from": "2013-11-20"}
    config = log.config({"path": "x", "date": "day"}, split=split)
    rows = raw_df.select("date", split_column(config).alias("split")).orderBy("date").collect()
    assert [row["split"] for row in rows] == ["train", "train", "valid", "valid", "test", "test"]
