"""LR by MLlib and by torch side by side, on the shards of a config.

    python tests/benchmarks/lr_by.py [--config conf/flights.yaml] [--held-out] [--set KEY=VALUE ...]

The stages ingest and features must have run. Both fit the LR of all train rows at every lr.l2, with
--held-out also those that the systems' starts hold rows out of (torch at every l2, MLlib at the one
that it chose). Seconds are of the whole: MLlib's with the writing of its vectors, torch's with the
start of the ranks. A pass is one over the rows that an LR sees. Nothing in the workspace changes.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from pyspark import StorageLevel
from pyspark.sql import Column, SparkSession

from lc_spark import config_file, files, metrics, session
from lc_spark.config import Config
from lc_spark.features.shards import read_field_map, read_manifest
from lc_spark.features.vectors import read_shards, shard_vectors
from lc_spark.training import launch, lr

LINE = "| {by} | {seconds:.1f} | {lrs} | {passes} | {l2:g} | {losses} | {aucs} |"


def by_mllib(spark: SparkSession, config: Config, parts: dict[str, Column]) -> str:
    """Fit by MLlib; return a line of the table."""
    started = time.perf_counter()
    field_map = read_field_map(config)
    train_df, valid_df = (
        shard_vectors(spark, config, field_map, s, files.uri(config.run_path / "vectors" / s))
        for s in ("train", "valid")
    )
    train_df = train_df.persist(StorageLevel.MEMORY_AND_DISK)
    losses, models, passes = {}, {}, 0
    for l2 in sorted(config.lr.l2, reverse=True):
        fit, models[l2] = lr.fit_lr(train_df, config, l2)
        passes += fit.iterations
        losses[l2] = metrics.log_loss(lr.scores_df(models[l2], valid_df))
    l2 = min(losses, key=lambda one: losses[one])
    held_out = lr.fit_held_out(train_df, parts, l2, config, field_map, {})
    aucs = {
        "train": metrics.exact_auc(lr.scores_df(models[l2], train_df)),
        "valid": metrics.exact_auc(lr.scores_df(models[l2], valid_df)),
    }
    seconds = time.perf_counter() - started
    train_df.unpersist()
    more = f" and those of {len(parts)} LRs" if parts else ""
    return line("MLlib", seconds, len(losses) + len(parts), f"{passes}{more}", losses,
                aucs | held_out)  # fmt: skip


def by_torch(spark: SparkSession, config: Config, parts: dict[str, Column]) -> str:
    """Fit by torch; return a line of the table."""
    started = time.perf_counter()
    train_df = read_shards(spark, config, "train")
    of_parts = lr.torch_parts(train_df, parts, read_manifest(config))
    made = launch.launch_lr(spark, config, of_parts)
    seconds = time.perf_counter() - started
    losses = dict(made["valid_losses"])
    by = f"torch, {made['seconds_per_epoch']:.1f} s a pass"
    lrs = len(losses) * len(of_parts)
    return line(by, seconds, lrs, str(made["iterations"]), losses, made["aucs"])


def line(
    by: str,
    seconds: float,
    lrs: int,
    passes: str,
    losses: dict[float, float],
    aucs: dict[str, float],
) -> str:
    """Return a line of the table."""
    return LINE.format(
        by=by,
        seconds=seconds,
        lrs=lrs,
        passes=passes,
        l2=min(losses, key=lambda one: losses[one]),
        losses=", ".join(f"{l2:g}: {losses[l2]:.5f}" for l2 in sorted(losses)),
        aucs=", ".join(f"{rows} {auc:.4f}" for rows, auc in aucs.items()),
    )


def main() -> None:
    """Parse, fit one after the other, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("conf/flights.yaml"))
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", choices=["mllib", "torch"])
    arguments = parser.parse_args()
    config = config_file.load(arguments.config, arguments.set)
    spark = session.start(config)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("shards", "field_map.json"):
            Path(folder, name).symlink_to(str(config.run_path / name))
        config = config.model_copy(update={"workspace": folder})
        manifest = read_manifest(config)
        parts = lr.held_out_parts(config, manifest) if arguments.held_out else {}
        ways = {"mllib": by_mllib, "torch": by_torch}
        chosen = [arguments.only] if arguments.only else list(ways)
        lines = [ways[name](spark, config, parts) for name in chosen]
        rows, d = manifest["splits"]["train"]["rows"], read_field_map(config).d
    spark.stop()
    print(f"{rows:,} train rows, {d:,} features, load {os.getloadavg()[0]:.1f}")
    print("| by | s | LRs | passes | l2 | valid log loss by l2 | AUC |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
