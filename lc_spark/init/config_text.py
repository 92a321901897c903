"""Turns a Profile into the commented YAML of a config that runs as it is."""

import json
import re
from pathlib import Path
from typing import Literal

import rich.markup
from rich import box
from rich.table import Table

from lc_spark import config_file
from lc_spark.errors import LcSparkError
from lc_spark.init import propose
from lc_spark.init.columns import sql_name
from lc_spark.init.profile import Profile
from lc_spark.init.propose import Choice

Format = Literal["parquet", "csv", "json", "delta"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
COMMENT_AT = 64  # where the comments of the fields begin


def guess_format(table: str) -> Format:
    """Return the format of a file or folder by its name, or by the names of the files in it.

    Raises LcSparkError when they do not tell.
    """
    path = Path(table)
    if (path / "_delta_log").is_dir():
        return "delta"
    files = (file.name for file in sorted(path.rglob("*"))) if path.is_dir() else ()
    for name in (path.name, *files):
        for suffix in Path(name).suffixes[::-1]:
            if suffix in SUFFIXES and not name.startswith((".", "_")):
                return SUFFIXES[suffix]
    if "://" not in table and not re.search(r"[*{]", table) and not path.exists():
        raise LcSparkError(f"There is no file or folder '{table}'.")
    raise LcSparkError(
        f"The name '{table}' does not tell its format: add --format parquet, csv, json or delta."
    )


def config_name(table: str) -> str:
    """Return a name for the config of a table: its file's, as far as a name may hold it."""
    stem = Path(table).name.split(".")[0]
    name = re.sub("[^A-Za-z0-9_]+", "_", stem).strip("_") or "table"
    return f"table_{name}" if name[0].isdigit() else name


def output_path(output: Path | None, name: str) -> Path:
    """Return where to write: conf/<name>.yaml, or here where there is no folder conf.

    Raises LcSparkError when the file exists.
    """
    path = output or (Path("conf") if Path("conf").is_dir() else Path()) / f"{name}.yaml"
    if path.exists():
        raise LcSparkError(f"{path} exists, and is not overwritten: give another with --output.")
    if not path.parent.is_dir():
        raise LcSparkError(f"There is no folder '{path.parent}' to write {path.name} into.")
    return path


def write(text: str, path: Path) -> None:
    """Write a config once it is seen to load.

    Raises LcSparkError when it does not, and leaves no file.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        config_file.load(part)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def yaml_text(
    profile: Profile, chosen: list[Choice], table: str, file_format: Format, name: str
) -> str:
    """Return the config as YAML, with what was seen beside each line.

    Raises LcSparkError when no column is left to learn from.
    """
    kept = [choice for choice in chosen if not choice.left_out]
    if not kept:
        reasons = "; ".join(f"{c.column.name}: {c.left_out}" for c in chosen)
        raise LcSparkError(f"No column of '{table}' is left to learn from ({reasons}).")
    split = propose.date_split(profile.days)
    lines = [
        f"# Written by `lc-spark init` from {_comment(table)}, {profile.rows:,} rows.",
        "# What was seen stands beside each line. Change what you know better; `lc-spark run`",
        "# takes the file as it is.",
        f"name: {_quoted(name)}",
        f"workspace: {_quoted(f'workspace/{name}')}",
        "seed: 0",
        "",
        *_source_lines(profile, table, file_format),
        "",
        *_label_lines(profile),
        "",
        *_split_lines(profile, split),
        "",
        "fields:",
        *[_field_line(choice, profile) for choice in kept],
        *_cross_lines(propose.crosses(chosen, profile.rows)),
        *_left_out_lines([choice for choice in chosen if choice.left_out]),
        "",
        *_training_lines(propose.sizes(profile.rows, split)),
    ]
    return "\n".join(lines) + "\n"


def _source_lines(profile: Profile, table: str, file_format: Format) -> list[str]:
    lines = ["source:", f"  path: {_quoted(table)}", f"  format: {file_format}"]
    date = propose.used_date(profile)
    if date:
        days = profile.days
        seen_days = f"{len(days):,} days, {days[0].day} to {days[-1].day}"
        lines.append(f"  date: {_quoted(sql_name(date))}  # {seen_days}")
    unique = propose.row_id(profile)
    if unique:
        lines.append(f"  row_id: [{_quoted(unique.name)}]  # another value in every row")
    n = propose.rejected_rows(profile)
    rejected = f"  max_rejected: {propose.max_rejected(profile)}"
    if n:
        without_label, corrupt = profile.label.missing, profile.corrupt
        reasons = {
            "without a label": without_label,
            "without a day": n - without_label - corrupt,
            "that do not parse": corrupt,
        }
        what = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        rejected += f"  # {100 * n / profile.rows:.1f} % of the rows are set aside: {what}"
    return [*lines, rejected]


def _label_lines(profile: Profile) -> list[str]:
    label = profile.label
    share = 100 * label.positives / (label.positives + label.negatives)
    return [
        f"# {_comment(repr(label.positive))} counts as positive ({label.positives:,} rows, "
        f"{share:.1f} %), {_comment(repr(label.negative))} as negative.",
        f"label: {_quoted(label.expression)}",
    ]


def _split_lines(profile: Profile, split: propose.DateSplit | None) -> list[str]:
    if split is None:
        why = "no column of dates"
        if profile.date:
            why = f"the days of {_comment(profile.date)} do not cut into such parts"
        return [
            f"# By a hash of the row: {why}.",
            "split: {by: hash, valid: 0.1, test: 0.2}",
        ]
    train, valid, test = (f"{100 * share:.0f}" for share in split.shares)
    return [
        f"# {train} / {valid} / {test} % of the rows train, validate, test: the later days judge.",
        f"split: {{by: date, valid_from: {split.valid_from}, test_from: {split.test_from}}}",
    ]


def _entry(choice: Choice) -> str:
    keys: dict[str, str | int] = {"name": choice.name}
    if choice.name != choice.column.name:
        keys["column"] = choice.column.name
    keys |= {"kind": choice.kind} | choice.settings
    return "{" + ", ".join(f"{key}: {_quoted(value)}" for key, value in keys.items()) + "}"


def _field_line(choice: Choice, profile: Profile) -> str:
    comment = seen(choice, profile)
    if choice.warning:
        comment += f"; WARNING: {choice.warning}"
    return f"  - {_entry(choice)}".ljust(COMMENT_AT) + f"  # {_comment(comment)}"


def seen(choice: Choice, profile: Profile) -> str:
    """Return what was seen of a column, in a few words."""
    column = choice.column
    parts = [column.type, f"{column.distinct:,} distinct"]
    if column.values:
        parts = [column.type, f"{column.values:,} distinct in lists of up to {column.most_values}"]
    if column.missing:
        parts.append(f"{missing_share(choice, profile)} missing")
    if column.holds == "number" and column.low is not None and column.high is not None:
        parts.append(f"{column.low:g} to {column.high:g}")
    return ", ".join(parts)


def missing_share(choice: Choice, profile: Profile) -> str:
    """Return the share of rows in which a column is missing, as 1.5 %."""
    return f"{100 * choice.column.missing / max(profile.rows - profile.corrupt, 1):.1f} %"


def _cross_lines(pairs: list[tuple[str, str]]) -> list[str]:
    if not pairs:
        return []
    entries = [f"  # - {{kind: crossed, of: [{_quoted(a)}, {_quoted(b)}]}}" for a, b in pairs]
    return ["  # Pairs worth a try; take '# ' away:", *entries]


def _left_out_lines(left_out: list[Choice]) -> list[str]:
    if not left_out:
        return []
    lines = ["  # Left out; take '# ' away to have one as a field:"]
    for choice in left_out:
        column = _comment(choice.column.name)
        entry = f"- {_entry(choice)}" if choice.kind else f"{column}:"
        lines.append(
            f"  # {_comment(entry)}".ljust(COMMENT_AT) + f"  # {_comment(choice.left_out)}"
        )
    return lines


def _training_lines(sizes: propose.Sizes) -> list[str]:
    return [
        "# Adds the pairs of fields that say more than their parts (takes minutes):",
        "# features: {crosses: auto, number: 5}",
        "",
        "shards:",
        f"  rows_per_group: {sizes.rows_per_group}",
        "",
        "training:",
        f"  ranks: {sizes.ranks}",
        f"  epochs: {sizes.epochs}",
        f"  batch_size: {sizes.batch_size}  # about {sizes.steps:,} steps an epoch",
        f"  hidden: [{sizes.hidden[0]}, {sizes.hidden[1]}]",
        "",
        "systems: [lr, lc_dnn, lc_wd]",
    ]


def _quoted(value: str | int) -> str:
    """Return a value as YAML that reads back as itself, whatever is in it."""
    if isinstance(value, int):
        return str(value)
    plain = re.fullmatch("[A-Za-z_][A-Za-z0-9_./]*", value)
    if plain and value.lower() not in ("y", "n", "yes", "no", "on", "off", "true", "false", "null"):
        return value
    # JSON's escapes are YAML's, but not for pairs of surrogates: so only what cannot be seen.
    return "".join(
        c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False)
    )


def _comment(text: str) -> str:
    """Return text that stays on its line of comment."""
    return "".join(c if c.isprintable() else " " for c in text)


def columns_table(profile: Profile, chosen: list[Choice]) -> Table:
    """Return the table for the terminal: one line a column."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("column", "kind", "distinct", "missing", "note"):
        table.add_column(heading, justify="right" if heading in ("distinct", "missing") else "left")
    for choice in chosen:
        kind = "left out" if choice.left_out else choice.kind
        if choice.settings.get("by"):
            kind += f" ({choice.settings['by']})"
        cells = [choice.column.name, kind, f"{choice.column.distinct:,}"]
        cells += [missing_share(choice, profile), choice.left_out or choice.warning]
        table.add_row(*[rich.markup.escape(_comment(cell)) for cell in cells])
    return table
