"""AUC of the next day, and the time of a day's run, by how the model is refreshed.

    python tests/benchmarks/refresh.py conf/flights_daily.yaml --first 2013-03-01 --days 30 \
        --output workspace/benchmarks/refresh

never: the model of the day before the first. refitted: every day from scratch on its window. warm:
every day on top of the day before (refresh.mode: append), networks on the window again; new_days:
likewise, networks on the new day alone. The strategies take turns within a day, in one Spark
session; networks are trained in this process, by one rank, so that the seconds are of the work and
not of starting ranks. Started again, it does what is not yet done.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import (
    config_file,
    evaluate,
    facts,
    figures,
    ingest,
    metrics,
    pipeline,
    registry,
    score,
    session,
    tables,
    tracking,
)
from lc_spark.config import Config
from lc_spark.training import launch, loop

REFITTED, NEVER = "refitted", "never"
REFRESH = {
    REFITTED: ["refresh.mode=scratch"],
    "warm": ["refresh.mode=append", "refresh.train_on=window"],
    "new_days": ["refresh.mode=append", "refresh.train_on=new_days"],
}
QUICK = ("spark.sql.shuffle.partitions=2", "spark.ui.enabled=false")


def load(path: str, folder: Path, strategy: str) -> Config:
    """Return the config of a strategy, with a workspace of its own and one rank."""
    overrides = [f"workspace={folder / strategy}", *REFRESH[strategy]]
    overrides += ["training.ranks=1", "training.batch_size=256"]
    config = config_file.load(path, overrides)
    settings = {**config.spark.settings, **dict(pair.split("=") for pair in QUICK)}
    return config.model_copy(
        update={"spark": config.spark.model_copy(update={"settings": settings})}
    )


def run_day(spark: SparkSession, config: Config) -> float:
    """Make the model of a day and promote it; return the seconds of features and training."""
    facts.forget(config, "features")
    parent = tracking.start_pipeline(config, {"day": str(config.day)})
    started = time.perf_counter()
    for stage in ("features", "train_lr"):
        pipeline.run_stage(stage, spark, config, parent)
    system = next(s for s in config.systems if s.system != "lr")
    loop.train(launch.train_spec(config, system, None))
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as bundle, tracking.stage(config, parent, "made") as run:
        evaluate.make_bundle(config, system, Path(bundle))
        version = registry.register(config, run, Path(bundle), system.name, {})
    registry.promote(config, version, "benchmark")
    facts.write(config, "evaluate", {"registered": f"models:/{config.model_name}/{version}"})
    tracking.end_run(config, parent, "FINISHED")
    return seconds


def scored(spark: SparkSession, config: Config, model: str, day: datetime.date) -> DataFrame:
    """Return (label, score) of a day's rows by a registered model."""
    rows_df = tables.read(spark, config, "raw").where(F.col("date") == F.lit(day))
    bundle = registry.download(config, model)
    return score.raw_scores_df(rows_df, bundle, ("row_id", "label"))


def measure(path: str, folder: Path, first: datetime.date, days: int) -> list[dict[str, Any]]:
    """Run the days that are not yet done; return a dict a day and strategy."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "days.jsonl"
    done = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    configs = {strategy: load(path, folder, strategy) for strategy in REFRESH}
    spark = session.start(configs[REFITTED])
    for config in configs.values():
        if not tables.exists(spark, config, "raw"):
            ingest.ingest(spark, config)
    scores = folder / "scores"
    for i in range(-1, days):
        day = first + datetime.timedelta(days=i)
        known = {entry["strategy"] for entry in done if entry["day"] == str(day)}
        found: list[dict[str, Any]] = []
        # Whoever comes later finds the page cache warm: they take turns.
        for strategy in sorted(REFRESH.keys() - known, reverse=i % 2 == 0):
            config = configs[strategy].for_day(day)
            found.append({"day": str(day), "strategy": strategy, "seconds": run_day(spark, config)})
        if NEVER not in known:
            found.append({"day": str(day), "strategy": NEVER, "seconds": 0.0})
        tomorrow = day + datetime.timedelta(days=1)
        for entry in found:
            strategy = entry["strategy"]
            config = configs[REFITTED if strategy == NEVER else strategy]
            which = "/1" if strategy == NEVER else "@champion"
            rows_df = scored(spark, config, f"models:/{config.model_name}{which}", tomorrow)
            named_df = rows_df.withColumns({"system": F.lit(strategy), "day": F.lit(tomorrow)})
            named_df.write.mode("overwrite").parquet(str(scores / str(day) / strategy))
            read_df = spark.read.parquet(str(scores / str(day) / strategy))
            one = metrics.evaluate(read_df)
            entry |= {"auc": one.auc, "logloss": one.logloss, "rows": one.rows}
            done.append(entry)
            with notes.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), flush=True)
    spark.stop()
    return done


def print_table(done: list[dict[str, Any]]) -> None:
    """Print what a day of each strategy is on average, and its difference to a daily refit."""
    by_strategy: dict[str, list[dict[str, Any]]] = {}
    for entry in done:
        by_strategy.setdefault(entry["strategy"], []).append(entry)
    refitted = by_strategy[REFITTED]
    rows = sum(entry["rows"] for entry in refitted)
    print(f"{len(refitted)} days, {rows:,} rows; means over the days, +- their standard error")
    print("| model | AUC | log loss | AUC - refitted | log loss - refitted | median s a day |")
    print("|---|---|---|---|---|---|")
    for strategy, entries in by_strategy.items():
        cells = [f"{statistics.mean(e[key] for e in entries):.4f}" for key in ("auc", "logloss")]
        for key in ("auc", "logloss"):
            pairs = zip(entries, refitted, strict=True)
            differences = [one[key] - other[key] for one, other in pairs]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            cells.append(f"{statistics.mean(differences):+.4f} +- {error:.4f}")
        cells.append(f"{statistics.median(e['seconds'] for e in entries):.1f}")
        print(f"| {strategy} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config")
    parser.add_argument("--first", type=datetime.date.fromisoformat, required=True)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    done = measure(arguments.config, arguments.output.resolve(), arguments.first, arguments.days)
    print_table([entry for entry in done if entry["day"] >= str(arguments.first)])
    curves: dict[str, tuple[list[str], list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for entry in done:
        days, aucs = curves.setdefault(entry["strategy"], ([], []))
        days.append(entry["day"])
        aucs.append(entry["auc"])
        seconds.setdefault(entry["strategy"], []).append(entry["seconds"])
    figure = figures.auc_by_day(curves, seconds)
    figure.savefig(arguments.output / "refresh.svg", metadata={"Date": None})
    figure.savefig(arguments.output / "refresh.png", dpi=110)
    print(f"Figure      {arguments.output / 'refresh.svg'}")


if __name__ == "__main__":
    main()
