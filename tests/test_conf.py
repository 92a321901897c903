"""The configs of public data sets read made-up rows in the very file formats of those sets."""

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from lc_spark import config_file, pipeline, tables
from lc_spark.features.shards import SPLITS
from lc_spark.field_map import FieldMap

pytestmark = pytest.mark.slow

CONF = Path(__file__).parent.parent / "conf"
ROWS = 300
Fill = Callable[[Path, random.Random], list[str]]


def lines(path: Path, rows: list[list[Any]], delimiter: str, encoding: str = "utf-8") -> str:
    """Write rows, None as nothing; return the path."""
    texts = [delimiter.join("" if v is None else str(v) for v in row) for row in rows]
    path.write_text("\n".join(texts) + "\n", encoding=encoding)
    return str(path)


def criteo(folder: Path, draw: random.Random) -> list[str]:
    rows = []
    for _ in range(ROWS):
        numbers = [draw.choice([None, -1, 0, 1, 7, 250, 65_535]) for _ in range(13)]
        codes = [draw.choice([None, "68fd1e64", "80e26c9b", "fb936136"]) for _ in range(26)]
        rows.append([draw.randint(0, 1), *numbers, *codes])
    rows[0][1:] = [None] * 39  # nothing but a label: 39 tabs
    rows[1][-1] = None  # a line that ends with a tab
    return [f"source.path={lines(folder / 'train.txt', rows, chr(9))}"]


def avazu(folder: Path, draw: random.Random) -> list[str]:
    names = (
        "id click hour C1 banner_pos site_id site_domain site_category app_id app_domain "
        "app_category device_id device_ip device_model device_type device_conn_type "
        "C14 C15 C16 C17 C18 C19 C20 C21"
    )
    rows: list[list[Any]] = [names.split()]
    for n in range(ROWS):
        hour = f"1410{21 + n % 10}{n % 24:02}"
        sites = [draw.choice(["1fbe01fe", "85f751fd", "5ee41ff2"]) for _ in range(9)]
        last = [draw.choice([-1, 35, 100_084]) for _ in range(8)]
        number = 10_000_174_058_809_263_569 + n  # more than 64 bits
        codes = [1005, draw.randint(0, 1), *sites, 1, draw.randint(0, 2)]
        rows.append([number, draw.randint(0, 1), hour, *codes, *last])
    return [f"source.path={lines(folder / 'train.csv', rows, ',')}"]


def movielens(folder: Path, draw: random.Random) -> list[str]:
    titles = [
        "Toy Story (1995)",
        "Misérables, Les (1995)",
        '"Great Performances" Cats (1998)',
        "Hate (Haine, La) (1995)",
        "2001: A Space Odyssey (1968)",
    ]
    genres = ["Animation|Children's|Comedy", "Drama", "Musical", "Drama|War", "Sci-Fi"]
    movies: list[list[Any]] = [[n + 1, titles[n % 5], genres[n % 5]] for n in range(15)]
    users: list[list[Any]] = [
        [n + 1, "FM"[n % 2], (1, 18, 25, 56)[n % 4], n % 21, f"0{n % 2}067"] for n in range(20)
    ]
    # From April 2000 to February 2003, most of them early.
    first, last = 956_703_932, 1_046_454_590
    rows: list[list[Any]] = []
    for n in range(ROWS):
        seconds = first + int((last - first) * (n / (ROWS - 1)) ** 2)
        film = (n // 20 + n % 20) % 15 + 1
        rows.append([n % 20 + 1, film, draw.randint(1, 5), seconds])
    return [
        f"source.path={lines(folder / 'ratings.dat', rows, '::')}",
        f"source.join.users.path={lines(folder / 'users.dat', users, '::')}",
        f"source.join.movies.path={lines(folder / 'movies.dat', movies, '::', 'latin-1')}",
    ]


def frappe_rows(draw: random.Random) -> list[list[int]]:
    """Label, user, item and 8 more, numbered as in the set: each field goes on from the last."""
    firsts = [(0, 957), (957, 1_000), (5039, 7), (5046, 7), (5053, 2), (5055, 3)]
    firsts += [(5058, 2), (5060, 9), (5069, 80), (5149, 233)]
    return [
        [draw.choice([-1, 1]), *(first + draw.randrange(min(size, 5)) for first, size in firsts)]
        for _ in range(ROWS)
    ]


def frappe(folder: Path, draw: random.Random) -> list[str]:
    rows = [[row[0], *(f"{value}:1" for value in row[1:])] for row in frappe_rows(draw)]
    for n, split in enumerate(("train", "validation", "test")):
        lines(folder / f"frappe.{split}.libfm", rows[n::3], " ")
    (folder / "README.txt").write_text("The frappe dataset contains ...\n")
    return [f"source.path={folder}/*.libfm"]


def frappe_csv(folder: Path, draw: random.Random) -> list[str]:
    names = "label user item daytime weekday isweekend homework cost weather country city"
    rows = [[max(row[0], 0), *row[1:]] for row in frappe_rows(draw)]
    lines(folder / "train.csv", [names.split(), *rows], ",")
    return [f"source.path={folder}/*.csv", 'source.delimiter=","', "source.columns=[]"]


def kkbox(folder: Path, draw: random.Random) -> list[str]:
    names = "msno song_id source_system_tab source_screen_name source_type target"
    rows: list[list[Any]] = [names.split()]
    for n in range(ROWS):
        tab = draw.choice(["explore", "my library", None])
        screen = draw.choice(["Local playlist more", "Explore", None])
        kind = draw.choice(["online-playlist", "local-library", None])
        rows.append([f"user{n % 12}+/=", f"song{n // 12}=", tab, screen, kind, n % 2])
    names = "msno city bd gender registered_via registration_init_time expiration_date"
    members: list[list[Any]] = [names.split()]
    for n in range(12):
        age, gender = (0, 24, 32, 1051, -38)[n % 5], ("female", "male", None)[n % 3]
        members.append([f"user{n}+/=", n % 3 + 1, age, gender, 7, 20_110_820 + n, 20_170_920])
    # Songs 20 to 24 are not in the file; one composer has a quote and a comma in the name.
    names = "song_id song_length genre_ids artist_name composer lyricist language"
    songs: list[list[Any]] = [names.split()]
    for n in range(20):
        genres = ("465", "444|1259", None, "465|444|1259|352|921")[n % 4]
        composer = ("TEDDY|  FUTURE BOUNCE|  Bekuh BOOM", '"Sam ""The Man"", Jr."', None)[n % 3]
        lyricist = ("何啟弘", None, None)[n % 3]
        language = (3.0, 31.0, -1.0, None)[n % 4]
        length = 180_000 + 997 * n
        songs.append(
            [f"song{n}=", length, genres, "張信哲 (Jeff Chang)", composer, lyricist, language]
        )
    return [
        f"source.path={lines(folder / 'train.csv', rows, ',')}",
        f"source.join.members.path={lines(folder / 'members.csv', members, ',')}",
        f"source.join.songs.path={lines(folder / 'songs.csv', songs, ',')}",
    ]


# config, maker of its files, number of fields, first and last day, SQL over raw -> what it gives
NO_DATES = (datetime.date(1970, 1, 1), datetime.date(1970, 1, 1))
CASES: list[tuple[str, Fill, int, tuple[datetime.date, datetime.date], dict[str, Any]]] = [
    (
        "criteo",
        criteo,
        39,
        NO_DATES,
        {
            "sort_array(collect_set(I2))": [-1, 0, 1, 7, 250, 65_535],
            "sort_array(collect_set(C26))": ["68fd1e64", "80e26c9b", "fb936136"],
            f"count_if(coalesce({', '.join(f'C{n + 1}' for n in range(26))}) IS NULL)": 1,
        },
    ),
    (
        "avazu",
        avazu,
        26,
        (datetime.date(2014, 10, 21), datetime.date(2014, 10, 30)),
        {
            "count(DISTINCT id)": ROWS,
            "collect_set(weekday) FILTER (WHERE date = '2014-10-30')": ["Thu"],
            "sort_array(collect_set(hour_of_day))": list(range(24)),
        },
    ),
    (
        "movielens_1m",
        movielens,
        10,
        (datetime.date(2000, 4, 25), datetime.date(2003, 2, 28)),
        {
            "sort_array(collect_set(year))": [1968, 1995, 1998],
            "count_if(label != CAST(rating >= 4 AS FLOAT))": 0,
            "count_if(gender IS NULL OR genres IS NULL OR title IS NULL)": 0,
        },
    ),
    (
        "frappe",
        frappe,
        13,
        NO_DATES,
        {"sort_array(collect_set(isweekend))": ["5053:1", "5054:1"]},
    ),
    (
        "frappe",
        frappe_csv,
        13,
        NO_DATES,
        {"sort_array(collect_set(isweekend))": ["5053", "5054"]},
    ),
    (
        "kkbox",
        kkbox,
        19,
        NO_DATES,
        {
            "sort_array(collect_set(age))": [24, 32],
            "collect_set(registration_year)": ["2011"],
            "sort_array(collect_set(language))": [-1.0, 3.0, 31.0],
            "count_if(artist_name IS NULL)": 5 * 12,
            "sort_array(collect_set(composer))": [
                'Sam "The Man", Jr.',
                "TEDDY|  FUTURE BOUNCE|  Bekuh BOOM",
            ],
        },
    ),
]


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all: to make one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.mark.parametrize(
    ("name", "fill", "n_fields", "days", "found"), CASES, ids=[case[1].__name__ for case in CASES]
)
def test_rows_of_the_published_shape_become_features(
    spark: SparkSession,
    tmp_path: Path,
    mlflow_store: str,
    name: str,
    fill: Fill,
    n_fields: int,
    days: tuple[datetime.date, datetime.date],
    found: dict[str, Any],
) -> None:
    overrides = fill(tmp_path, random.Random(7))
    overrides += [f"workspace={tmp_path / 'workspace'}", "shards.rows_per_group=64"]
    overrides += [f"tracking.uri={mlflow_store}"]
    config = config_file.load(CONF / f"{name}.yaml", overrides)
    ingested = pipeline.run_stage("ingest", spark, config)
    assert (ingested["source_rows"], ingested["raw_rows"]) == (ROWS, ROWS)
    assert ingested["rejected"] == {}
    raw_df = tables.read(spark, config, "raw")
    ends = raw_df.agg(F.min("date"), F.max("date"), F.avg("label")).collect()[0]
    assert (ends[0], ends[1]) == days
    assert 0.3 < ends[2] < 0.7
    assert list(raw_df.selectExpr(*found).collect()[0]) == list(found.values())

    features = pipeline.run_stage("features", spark, config)
    assert features["fields"] == n_fields
    assert sum(features["shard_rows"].values()) == ROWS
    assert all(features["shard_rows"][split] > 0 for split in SPLITS)
    field_map = FieldMap.read(config.workspace_path / "field_map.json")
    # Beside "missing" and "rare" a value of its own, or more than one bucket. So few rows cannot
    # fill every cross.
    empty = [f.name for f in field_map.fields if f.kind != "crossed" and f.size < 3]
    assert empty == []
