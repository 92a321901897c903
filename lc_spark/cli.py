"""The command ``lc-spark``, and the same entry for the scripts in jobs/."""

import datetime
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from lc_spark import config_file
from lc_spark.errors import LcSparkError

app = typer.Typer(
    help="Locally connected click models (LC-DNN) on Spark.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
# The result tables have eight columns: a pipe or a narrow terminal must not cut their names.
wide_console = Console(width=max(console.width, 104))

ConfigPath = Annotated[Path, typer.Argument(help="the YAML of one data set")]
ConfigOption = Annotated[Path, typer.Option("--config", help="the YAML of one data set")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a setting, as training.epochs=3")
]
Why = Annotated[str, typer.Option("--why", help="the reason, kept in the version's tags")]
Day = Annotated[
    datetime.datetime | None,
    typer.Option("--date", formats=["%Y-%m-%d"], help="the day of the run; default: all days"),
]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    date: Day = None,
    until: Annotated[
        datetime.datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="run every day from --date to this one"),
    ] = None,
) -> None:
    """Run all stages: ingest, features, LR, LC systems, evaluation, report, gate, promotion."""
    settings = config_file.load(config, overrides)
    days = _days(date, until)
    from lc_spark import pipeline, process, session

    spark = session.start(settings)
    with process.only_one(settings):
        for day in days:
            made = {
                stage: pipeline.run_stage(stage, spark, settings.for_day(day))
                for stage in pipeline.RUN_STAGES
            }
    spark.stop()
    from lc_spark import report

    facts = made["evaluate"]
    wide_console.print(report.result_table(facts["results"], facts["best"]))
    console.print(f"Report      {facts['report']}", soft_wrap=True)
    console.print(f"Model       {facts['registered']}", soft_wrap=True)
    console.print(f"Gate        {made['gate']['says']}", soft_wrap=True)
    console.print(f"MLflow      lc-spark ui {config}", soft_wrap=True)


def _days(
    first: datetime.datetime | None, last: datetime.datetime | None
) -> list[datetime.date | None]:
    if first is None or last is None:
        if last is not None:
            raise LcSparkError("--until needs --date, the first day.")
        return [first and first.date()]
    n = (last - first).days + 1
    if n < 1:
        raise LcSparkError(f"--until {last.date()} is before --date {first.date()}.")
    return [first.date() + datetime.timedelta(days=i) for i in range(n)]


@app.command()
def experiment(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be trained, and stop")
    ] = False,
) -> None:
    """Compare systems x starts x seeds: the paper's tables for your data, in one report."""
    from lc_spark import experiment as experiments
    from lc_spark import report, session

    settings = config_file.load(config, overrides)
    if dry_run:
        console.print(experiments.plan(settings))
        return
    spark = session.start(experiments.expanded(settings, experiments.cells(settings)))
    facts = experiments.run_experiment(spark, settings)
    spark.stop()
    wide_console.print(report.result_table(facts["results"], facts["best"]))
    for claim in facts["claims"]:
        console.print(claim, soft_wrap=True)
    console.print(f"Report      {facts['report']}", soft_wrap=True)
    console.print(f"MLflow      lc-spark ui {config}", soft_wrap=True)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, date: Day = None) -> None:
    """Say before a run what there will be and what it takes: features, memory, disk, seconds."""
    from lc_spark import plan as plans
    from lc_spark import plan_tables, session, trial

    settings = config_file.load(config, overrides).for_day(date and date.date())
    spark = session.start(settings)
    measured = trial.run_trial(spark, settings)
    cores = spark.sparkContext.defaultParallelism
    spark.stop()
    planned = plans.of_trial(settings, measured, cores)
    for table in plan_tables.all_tables(planned):
        wide_console.print(table)
    for line in (*plan_tables.remarks(planned), plan_tables.sentence(planned)):
        console.print(line, soft_wrap=True, markup=False)


@app.command()
def init(
    table: Annotated[str, typer.Argument(help="file or folder of raw rows")],
    label: Annotated[str, typer.Option(help="the column to predict, of two values")],
    file_format: Annotated[
        Literal["parquet", "csv", "json", "delta"] | None,
        typer.Option("--format", help="default: by the name of the table"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="default: conf/<name>.yaml")] = None,
    name: Annotated[str | None, typer.Option(help="default: by the name of the table")] = None,
) -> None:
    """Look at a table of raw rows and write a config for it."""
    from lc_spark import config, failures, session, source_settings, sources
    from lc_spark.init import config_text, profile, propose

    name = config_text.config_name(name or table)
    file_format = file_format or config_text.guess_format(table)
    path = config_text.output_path(output, name)
    spark = session.start_for(name, config.Spark())
    files = source_settings.Files(format=file_format)
    with failures.told(spark, "init", None):
        rows_df = sources.read_files(spark, files, [table.replace("{date}", "*")], "TABLE")
        found = profile.profile(rows_df, label)
    spark.stop()
    chosen = propose.choices(found)
    config_text.write(config_text.yaml_text(found, chosen, table, file_format, name), path)
    console.print(config_text.columns_table(found, chosen))
    for choice in chosen:
        if choice.warning:
            console.print(f"Warning     {choice.column.name}: {choice.warning}", markup=False)
    console.print(f"Config      {path}", soft_wrap=True, markup=False)
    console.print(f"Next        lc-spark run {path}", soft_wrap=True, markup=False)


@app.command()
def synth(
    name: Annotated[Literal["appdata", "feedsdata"], typer.Argument(help="the shape of the log")],
    output: Annotated[str, typer.Argument(help="the folder to write, or replace")],
    rows: Annotated[
        int | None, typer.Option(min=1000, help="default: as many as the paper")
    ] = None,
    seed: int = 1,
) -> None:
    """Make a click log of the size and shape of one of the paper's, as Parquet."""
    from lc_spark import config, paper_logs, session

    spark = session.start_for(f"synth {name}", config.Spark())
    rows = rows or paper_logs.SHAPES[name].rows
    started = time.perf_counter()
    written = paper_logs.write_log(spark, name, rows, seed, output)
    spark.stop()
    seconds = time.perf_counter() - started
    console.print(f"Log         {output}: {written:,} rows ({seconds:.0f} s)", soft_wrap=True)


@app.command()
def ui(config: ConfigPath, port: int = 5000, overrides: Overrides = None) -> None:
    """Open MLflow on the runs of a config, on 127.0.0.1."""
    from lc_spark import tracking

    tracking.serve_ui(config_file.load(config, overrides), port)


@app.command()
def serve(config: ConfigPath, port: int = 5001, overrides: Overrides = None) -> None:
    """Answer raw rows with the champion's scores over HTTP, on 127.0.0.1."""
    from lc_spark import serving

    serving.serve(config_file.load(config, overrides), port)


@app.command()
def champion(config: ConfigPath, overrides: Overrides = None) -> None:
    """List the versions of the registered model: which is champion, since when and why."""
    from lc_spark import registry, report

    settings = config_file.load(config, overrides)
    wide_console.print(report.versions_table(settings.model_name, registry.versions(settings)))


@app.command()
def promote(config: ConfigPath, version: str, why: Why, overrides: Overrides = None) -> None:
    """Make a version the champion by hand, without the gate."""
    from lc_spark import registry

    settings = config_file.load(config, overrides)
    registry.promote(settings, version, f"by hand: {why}")
    console.print(f"Champion    models:/{settings.model_name}/{version}")


@app.command()
def rollback(config: ConfigPath, why: Why, overrides: Overrides = None) -> None:
    """Give the alias champion back to the version that had it before."""
    from lc_spark import registry

    settings = config_file.load(config, overrides)
    old, new = registry.rollback(settings, why)
    console.print(f"Champion    models:/{settings.model_name}/{new}, again; it was {old}")


@app.command()
def schema() -> None:
    """Print the JSON schema of the config, for editors."""
    typer.echo(json.dumps(config_file.schema(), indent=1))


def job(stage: str) -> None:
    """Run one stage as a spark-submit entry point: ``--config F [--date D] [--set k=v]``."""

    def stage_command(config: ConfigOption, date: Day = None, overrides: Overrides = None) -> None:
        settings = config_file.load(config, overrides).for_day(date and date.date())
        from lc_spark import pipeline, process, session

        process.end_with_parent()
        spark = session.start(settings)
        with process.only_one(settings):
            pipeline.run_stage(stage, spark, settings)
        spark.stop()

    _main(lambda: typer.run(stage_command))


def main() -> None:
    """Run the command line."""
    _main(app)


def _main(command: Callable[[], None]) -> None:
    """Run a command; an error that users are meant to read is printed without a stack trace."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("lc_spark").setLevel(logging.INFO)
    try:
        command()
    except LcSparkError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
