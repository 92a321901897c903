"""Scores a day's rows, or all of ``raw``, with the champion, and says which fields drifted."""

import dataclasses
import datetime
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lc_spark import figures, files, registry, report, rows, tables, tracking
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.facts import Facts
from lc_spark.features import drift
from lc_spark.features.drift import FieldCounts, FieldDrift
from lc_spark.field_map import FieldMap, require_same
from lc_spark.files import AnyPath
from lc_spark.score import Scored, scored_rows
from lc_spark.tracking import StageRun

log = logging.getLogger("lc_spark")

MOST_BARS = 20  # fields in the figure; the table has all
MOST_NAMED = 5  # fields in the warning; the page has all


def score_stage(spark: SparkSession, config: Config, parent: str) -> Facts:
    """Source rows of a date, or all of raw, and the champion -> Delta scores, drift of fields."""
    with tracking.stage(config, parent, "score") as run:
        return score_with_champion(spark, config, run, config.day)


def score_with_champion(
    spark: SparkSession, config: Config, run: StageRun, date: datetime.date | None
) -> Facts:
    """Write the scores of a day's rows to ``scores``, and return the stage's facts.

    With a date the rows come from the source as they are, before there are labels, and replace
    that day's scores; without one they are those of ``raw``, and replace all. Raises LcSparkError,
    before ``scores`` is touched, when there are no rows, or too many that cannot be scored.
    """
    model_uri = registry.version_of(config, f"models:/{config.model_name}@champion")
    bundle = registry.download(config, model_uri)
    field_map = FieldMap.read(bundle / "field_map.json")
    condition = None if date is None else tables.date_condition("date", date)
    with scored_rows(_rows_df(spark, config, date, field_map), bundle) as scored:
        _check(config, date, scored)
        scores_df = scored.scores_df.withColumn("model", F.lit(model_uri))
        scores_df = scores_df.hint("rebalance", "date")
        version = tables.write(scores_df, config, "scores", ("date",), condition)
    aside = sum(scored.set_aside.values())
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in scored.set_aside.items())
    if aside:
        log.warning("score: %s rows cannot be scored and were set aside: %s", f"{aside:,}", reasons)
    drifts = _drifts(bundle, scored.counts, field_map)
    far = drift.drifted(drifts, config.scoring.psi)
    run.log_metrics({"rows": scored.rows, "set_aside": aside, "drifted_fields": len(far)})
    run.set_tags({"scores_version": str(version), "date": str(date or "all"), "model": model_uri})
    page = _log_drift(config, run, model_uri, date, scored, drifts)
    _warn(config, far, len(drifts), page)
    return {
        "rows": scored.rows,
        "set_aside": scored.set_aside,
        "model": model_uri,
        "drifted": [one.field for one in far],
        "report": str(page),
        "run_id": run.run_id,
        "summary": f"{scored.rows:,} rows scored by {model_uri} into table scores"
        + (f", {aside:,} set aside ({reasons})" if aside else "")
        + (f"; {len(far)} of {len(drifts)} fields drifted" if drifts else ""),
    }


def _rows_df(
    spark: SparkSession, config: Config, date: datetime.date | None, field_map: FieldMap
) -> DataFrame:
    if date is None:
        version = tables.version(spark, config, "raw")
        return tables.read_with_places(spark, config, "raw", version)
    if not config.source.row_id:
        log.warning(
            "score: source.row_id is not set, so a row's id is made of all its columns, labels "
            "too: scores cannot be joined to labels that come later"
        )
    return rows.unlabelled_df(spark, config, date, field_map.raw_columns)


def _check(config: Config, date: datetime.date | None, scored: Scored) -> None:
    aside = sum(scored.set_aside.values())
    where = "'raw' has no rows" if date is None else f"The source has no rows of {date}"
    if scored.rows + aside == 0:
        raise LcSparkError(f"{where}: there is nothing to score, and 'scores' was not changed.")
    if aside > config.source.max_rejected * (scored.rows + aside) or scored.rows == 0:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in scored.set_aside.items())
        raise LcSparkError(
            f"{aside} of {scored.rows + aside} rows cannot be scored ({reasons}), more than "
            f"source.max_rejected = {config.source.max_rejected}: 'scores' was not changed."
        )


def _drifts(bundle: Path, counts: FieldCounts, field_map: FieldMap) -> list[FieldDrift]:
    """Return how far the scored rows are from the model's train rows, field by field."""
    path = bundle / drift.TRAIN_COUNTS
    if not path.is_file():
        log.warning(
            "score: the model does not say what its train rows were like (it was registered by an "
            "earlier version), so drift is not looked at: train and register it again"
        )
        return []
    train = FieldCounts.from_json(path.read_text(encoding="utf-8"))
    require_same(field_map.fingerprint, train.fingerprint, path.name)
    return drift.compare(train, counts, field_map)


def _warn(config: Config, far: Sequence[FieldDrift], fields: int, page: AnyPath) -> None:
    """Say in one line which fields drifted, the farthest first."""
    if not far:
        return
    said = ", ".join(f"{one.field} (PSI {one.psi:.2f})" for one in far[:MOST_NAMED])
    more = f" and {len(far) - MOST_NAMED} more" if len(far) > MOST_NAMED else ""
    log.warning(
        "score: %d of %d fields drifted from the train rows by more than scoring.psi = %g: %s%s; "
        "see %s",
        len(far),
        fields,
        config.scoring.psi,
        said,
        more,
        page,
    )


def _log_drift(
    config: Config,
    run: StageRun,
    model_uri: str,
    date: datetime.date | None,
    scored: Scored,
    drifts: Sequence[FieldDrift],
) -> AnyPath:
    """Write report/scores.html; log it, and the drift as a table and a figure."""
    threshold = config.scoring.psi
    figure = figures.field_drift({d.field: d.psi for d in drifts[:MOST_BARS]}, threshold)
    if drifts:
        run.log_table(pd.DataFrame([dataclasses.asdict(d) for d in drifts]), "drift.json")
        run.log_figure(figure, "drift.svg")
    html = report.render(
        "scores.html",
        name=config.name,
        model=model_uri,
        date=date,
        scored=scored,
        drifts=drifts,
        drifted=[one.field for one in drift.drifted(drifts, threshold)],
        threshold=threshold,
        figure=report.inline(figure),
    )
    run.log_text(html, "scores.html")
    page = config.run_path / "report" / "scores.html"
    files.write_text(page, html)
    return page
