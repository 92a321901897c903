"""How long batch scoring takes, beside encoding the same rows and only reading them.

    python tests/benchmarks/scoring.py [--config conf/flights.yaml] [--times 5]

Rows of the config's `raw` and its champion; no table is written. `score` reads, encodes, counts for
drift and scores every row, `encode` reads and encodes, `read` only prepares the hashes and numbers,
of all fields, in the JVM. They take turns after one round that is not counted.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from pyspark.sql import DataFrame
from turns import print_turns, take_turns

from lc_spark import config_file, registry, session, tables
from lc_spark.features.packed import packed_df
from lc_spark.features.prepare import prepared_column
from lc_spark.score import scored_rows
from lc_spark.training.scorer import Scorer


def consume(df: DataFrame) -> None:
    """Compute every row and keep none."""
    df.write.format("noop").mode("overwrite").save()


def main() -> None:
    """Parse, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("conf/flights.yaml"))
    parser.add_argument("--workspace", default=None)
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    overrides = [f"workspace={arguments.workspace}"] if arguments.workspace else []
    config = config_file.load(arguments.config, overrides)
    spark = session.start(config)
    version = tables.version(spark, config, "raw")
    raw_df = tables.read_with_places(spark, config, "raw", version)
    bundle = registry.download(config, f"models:/{config.model_name}@champion")
    scorer = Scorer(bundle)
    prepared = [prepared_column(i) for i in scorer.field_map.fields if i.kind != "crossed"]

    def score() -> None:
        with scored_rows(raw_df, bundle) as scored:
            consume(scored.scores_df)

    def encode() -> None:
        consume(packed_df(raw_df, scorer.field_map, scorer.vocabulary, ("row_id", "date")))

    def read() -> None:
        consume(raw_df.select("row_id", "date", *prepared))

    calls: dict[str, Callable[[], None]] = {"score": score, "encode": encode, "read": read}
    seconds = take_turns(calls, arguments.times)
    n, load = raw_df.count(), os.getloadavg()[0]
    spark.stop()
    print(f"{n:,} rows, {len(scorer.field_map.fields)} fields, load {load:.1f}")
    print_turns(seconds, "encode", n)


if __name__ == "__main__":
    main()
