"""How long features take, beside a plain copy of the same table and MLlib's StringIndexer.

    python tests/benchmarks/features.py LOG [--config conf/appdata.yaml] [--times 5]
    python tests/benchmarks/features.py LOG --indexer --fields 40 --rows 1000000

LOG is a folder of Parquet files with the columns of the config (lc-spark synth). It is ingested
into a new workspace first, which is not counted; with --fields as the config's last so many text
columns alone, with --rows as so many of its rows, by chance. Then these take turns, after one round
that is not counted either: `copy` reads raw by Spark and writes it as Parquet; `features` fits the
field map and the vocabulary, writes the table `vocabulary` and the shards; with --indexer
`StringIndexer` fits MLlib's on the text columns and writes the rows with its indices (it has no
min_count, so that `features` keeps every value too, and both see all rows).
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pyspark.ml.feature import StringIndexer
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from turns import print_turns, take_turns

from lc_spark import config_file, ingest, session, tables
from lc_spark.config import Config
from lc_spark.features.fit import fit_features
from lc_spark.features.levels import write_levels
from lc_spark.features.shards import write_shards


def write_part(spark: SparkSession, log: Path, config: Config, rows: int | None) -> None:
    """Write the columns of a log that the config reads, and so many rows of it, as its source."""
    log_df = spark.read.parquet(str(log))
    if rows is not None:
        log_df = log_df.sample(rows / log_df.count(), config.seed)
    columns = [f.name for f in config.fields]
    log_df.select("impression", "date", "clicked", "true_probability", *columns).write.parquet(
        str(config.source.path)
    )


def main() -> None:
    """Parse, ingest, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--config", type=Path, default=Path("conf/appdata.yaml"))
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--indexer", action="store_true")
    parser.add_argument("--fields", type=int)
    parser.add_argument("--rows", type=int)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lc_spark_features_"))
    overrides = [f"workspace={folder}", f"source.path={folder}/log"]
    config = config_file.load(arguments.config, overrides)
    fields = config.fields
    if arguments.fields:
        fields = tuple(f for f in fields if f.kind == "categorical")[-arguments.fields :]
    if arguments.indexer:
        fields = tuple(f.model_copy(update={"min_count": 1}) for f in fields)
    config = config.model_copy(update={"fields": fields})
    spark = session.start(config)
    write_part(spark, arguments.log, config, arguments.rows)
    version = ingest.ingest(spark, config).raw_version
    raw_df = tables.read(spark, config, "raw", version)
    placed_df = tables.read_with_places(spark, config, "raw", version)
    texts = [f.name for f in fields if f.kind == "categorical"]

    def copy() -> None:
        raw_df.write.mode("overwrite").parquet(str(folder / "copy"))

    def features() -> None:
        train = ingest.split_column(config) == "train"
        train_df = placed_df if arguments.indexer else placed_df.where(train)
        fitted = fit_features(train_df, config.fields, config.seed)
        write_levels(spark, fitted.levels, config)
        write_shards(placed_df, fitted.field_map, fitted.vocabulary, config, version)
        spark.catalog.clearCache()

    def string_indexer() -> None:
        indexed = [f"{text}_index" for text in texts]
        indexer = StringIndexer(inputCols=texts, outputCols=indexed, handleInvalid="keep")
        indexed_df = indexer.fit(raw_df).transform(raw_df)
        columns = [F.col(name).cast("int").alias(name) for name in indexed]
        indexed_df.select("row_id", "label", *columns).write.mode("overwrite").parquet(
            str(folder / "indexed")
        )

    calls: dict[str, Callable[[], None]] = {"copy": copy, "features": features}
    if arguments.indexer:
        calls["StringIndexer"] = string_indexer
    seconds = take_turns(calls, arguments.times)
    rows, d = raw_df.count(), tables.read(spark, config, "vocabulary").count()
    spark.stop()
    shutil.rmtree(folder)
    print(f"{rows:,} rows, {len(fields)} fields, {d:,} features")
    print_turns(seconds, "copy", rows)


if __name__ == "__main__":
    main()
