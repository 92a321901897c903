"""A config that is wrong says which key, which value, and what is allowed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lc_spark import cli, config_file
from lc_spark.config import Config
from lc_spark.errors import LcSparkError
from lc_spark.systems import Training

CONFIGS = sorted((Path(__file__).parent.parent / "conf").glob("*.yaml"))

VALID: dict[str, Any] = {
    "name": "toy",
    "workspace": "workspace/toy",
    "source": {"path": "rows.parquet", "date": "day"},
    "label": "clicked",
    "split": {"by": "hash", "valid": 0.1, "test": 0.2},
    "fields": [
        {"name": "site", "kind": "categorical"},
        {"name": "price", "kind": "bucketed"},
        {"name": "age", "kind": "continuous"},
        {"name": "tags", "kind": "multivalued", "delimiter": ","},
        {"kind": "crossed", "of": ["site", "price"]},
    ],
    "systems": ["lr", {"system": "lc_dnn", "name": "lc_dnn_k8", "training": {"channels": 8}}],
}


def write(folder: Path, changes: dict[str, Any]) -> Path:
    """Write VALID with changes, each ``section.key`` (a number is a place in a list) -> value."""
    data = copy.deepcopy(VALID)
    for key, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        node: Any = data
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node[parent]
        node[last] = value
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def error_of(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(LcSparkError) as caught:
        config_file.load(path, overrides)
    message = str(caught.value)
    for noise in ("validation error", "pydantic", "Traceback", "input_value", "Tuple", "tag"):
        assert noise not in message, message
    return message


def test_the_valid_config_is_read_as_written(tmp_path: Path) -> None:
    made = config_file.load(write(tmp_path, {}))
    assert [field.name for field in made.fields] == ["site", "price", "age", "tags", "site_x_price"]
    assert [system.name for system in made.systems] == ["lr", "lc_dnn_k8"]
    assert made.training_of(made.systems[0]) == Training(start="lr")
    assert made.training_of(made.systems[1]) == Training(channels=8)
    assert made.model_name == "toy"
    assert made.workspace_path.is_absolute()
    field = made.fields[0]
    assert field.kind == "categorical"
    assert field.column == "site"


@pytest.mark.parametrize(
    ("key", "place", "nearest", "allowed"),
    [
        ("trainin", "trainin", "training", "workspace"),
        ("source.pth", "source.pth", "path", "max_rejected"),
        ("split.vaild", "split.vaild", "valid", "test"),
        ("fields.0.mincount", "fields.0.mincount", "min_count", "hashed"),
        ("fields.1.bucket", "fields.1.bucket", "buckets", "cut_points"),
        ("fields.2.colum", "fields.2.colum", "column", "name"),
        ("fields.3.max_value", "fields.3.max_value", "max_values", "delimiter"),
        ("fields.4.off", "fields.4.off", "of", "hashed"),
        ("shards.fold", "shards.fold", "folds", "rows_per_group"),
        ("lr.l_2", "lr.l_2", "l2", "tolerance"),
        ("training.epoch", "training.epoch", "epochs", "learning_rate"),
        ("systems.1.trainig", "systems.1.trainig", "training", "system"),
        ("systems.1.training.chanels", "systems.1.training.chanels", "channels", "hidden"),
        ("evaluation.groups", "evaluation.groups", "group", "group"),
        ("tracking.url", "tracking.url", "uri", "experiment"),
        ("spark.setings", "spark.setings", "settings", "master"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_the_allowed_ones(
    tmp_path: Path, key: str, place: str, nearest: str, allowed: str
) -> None:
    message = error_of(write(tmp_path, {key: 1}))
    line = next(line for line in message.splitlines() if line.startswith(f"  {place}: "))
    assert "is not a key that is known here" in line
    assert f"Did you mean '{nearest}'?" in line
    known = line.split("Allowed: ")[1].split(", ")
    assert {nearest, allowed} <= set(known)
    assert len(message.splitlines()) == 2, "one problem, one line"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.epochs", "three", ["training.epochs", "'three'", "integer"]),
        ("training.epochs", 0, ["training.epochs", "is 0", "greater than 0"]),
        ("training.channels", 0, ["training.channels", "is 0", "greater than 0"]),
        ("training.start", "frozn", ["training.start", "'lr'", "Did you mean 'frozen'?"]),
        ("training.dropout", 1, ["training.dropout", "is 1", "less than 1"]),
        ("systems.1.training.channels", 0, ["systems.1.training.channels", "greater than 0"]),
        ("systems.0", "lc_dn", ["systems.0.system", "Did you mean 'lc_dnn'?", "'lc_wd'"]),
        ("lr.l2", -1, ["lr.l2.0", "is -1", "greater than or equal to 0"]),
        ("split", {"by": "has"}, ["split.by", "is 'has'", "Did you mean 'hash'?", "date"]),
        ("split", {}, ["split.by", "missing", "Allowed: hash, date"]),
        ("split.test", 0.9, ["split", "valid + test", "below 1"]),
        ("split.valid", 0, ["split.valid", "is 0", "greater than 0"]),
        ("split", {"by": "date", "valid_from": "soon"}, ["split.valid_from", "'soon'", "date"]),
        (
            "split",
            {"by": "date", "valid_from": "2013-12-01", "test_from": "2013-11-01"},
            ["split", "valid_from must be before test_from"],
        ),
        ("fields.0.kind", "categorial", ["fields.0.kind", "Did you mean 'categorical'?"]),
        ("fields.0", {"name": "a"}, ["fields.0.kind", "missing", "multivalued"]),
        ("fields.0", {"kind": "categorical"}, ["fields.0.name", "is needed and missing"]),
        ("fields.0.name", "a b", ["fields.0.name", "'a b'"]),
        ("fields.1.cut_points", [1, 2], ["fields.1", "goes with 'by: cut_points'"]),
        ("fields.1.by", "cut_points", ["fields.1", "goes with 'by: cut_points'"]),
        ("fields.1.by", "quantiles", ["fields.1.by", "Did you mean 'quantile'?"]),
        ("fields.3.delimiter", "", ["fields.3.delimiter", "is ''"]),
        ("fields", [], ["fields", "at least 1 item"]),
        ("source.row_id", "id", ["source.row_id", "'id'", "list"]),
        ("source.dataset", "flights", ["source", "either 'path' or 'dataset'"]),
        ("source", {"path": "logs/{date}"}, ["source", "{date}", "'date'"]),
        ("source.max_rejected", 1, ["source.max_rejected", "less than 1"]),
        ("source.delimiter", ";", ["source", "'delimiter' goes with 'format: csv'"]),
        ("source.columns", ["a"], ["source", "'columns' goes with 'format: csv'"]),
        ("source", {"path": "x", "format": "csv", "columns": ["a", "A"]}, ["names 'a' twice"]),
        ("source.join", {"u": {"path": "x"}}, ["source.join.u.keys", "is needed and missing"]),
        ("source.join", {"u": {"pth": "x"}}, ["source.join.u.pth", "Did you mean 'path'?"]),
        ("source.derive", {"a b": "1"}, ["source.derive", "a b"]),
        ("training", None, ["training", "is None", "keys and values"]),
        ("workspace", "s3://bucket/x", ["no local folder", "set tracking.uri"]),
        ("spark.driver_memory", "lots", ["spark.driver_memory", "'lots'"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(
    tmp_path: Path, key: str, value: Any, said: list[str]
) -> None:
    message = error_of(write(tmp_path, {key: value}))
    for part in said:
        assert part in message


def test_cut_points_must_ascend_strictly(tmp_path: Path) -> None:
    field = {"name": "p", "kind": "bucketed", "by": "cut_points"}
    for points in ([2, 1], [1, 1]):
        path = write(tmp_path, {"fields": [{**field, "cut_points": points}]})
        assert "fields.0: cut_points must ascend strictly" in error_of(path)
    config_file.load(write(tmp_path, {"fields": [{**field, "cut_points": [1, 2]}]}))


def test_auto_crosses_need_two_fields_that_can_be_crossed(tmp_path: Path) -> None:
    config_file.load(write(tmp_path, {"features.crosses": "auto"}))
    fields = [VALID["fields"][0], *VALID["fields"][2:4]]
    message = error_of(write(tmp_path, {"features.crosses": "auto", "fields": fields}))
    assert "needs two categorical or bucketed fields at least, 'fields' has 1" in message


def test_split_by_date_needs_a_date(tmp_path: Path) -> None:
    split = {"by": "date", "valid_from": "2013-11-01", "test_from": "2013-12-01"}
    assert "needs source.date" in error_of(
        write(tmp_path, {"split": split, "source": {"path": "rows.parquet"}})
    )


@pytest.mark.parametrize("name", ["site", "SITE"])
def test_two_fields_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    message = error_of(write(tmp_path, {"fields.2.name": name}))
    assert "two fields are named 'site'" in message


def test_two_systems_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "two systems are named 'lr'" in error_of(write(tmp_path, {"systems": ["lr", "lr"]}))


def test_no_other_system_may_be_named_lr(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, {"systems": [{"system": "lc_wd", "name": "lr"}]}))
    assert "kept for LR itself, not for a lc_wd" in message


@pytest.mark.parametrize("name", ["label", "row_id", "fold", "split", "date", "Label", "__x"])
def test_reserved_field_names_are_refused(tmp_path: Path, name: str) -> None:
    message = error_of(write(tmp_path, {"fields.0.name": name}))
    assert f"cannot be named '{name}'" in message
    assert "label, row_id, fold" in message


def test_the_true_probability_is_refused_as_a_field(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, {"evaluation": {"truth": "Age"}}))
    assert "the field 'age' reads 'age', the true probability" in message


@pytest.mark.parametrize(
    ("parents", "said"),
    [
        (["site", "prise"], "names 'prise'.*Did you mean 'price'.*Allowed: site, price"),
        (["site", "tags"], "names 'tags', which is no categorical or bucketed field"),
        (["site", "age"], "names 'age', which is no categorical or bucketed field"),
        (["site", "site"], "names a field twice"),
        (["site"], "at least 2 items"),
    ],
)
def test_a_cross_takes_two_or_more_known_fields_of_one_value(
    tmp_path: Path, parents: list[str], said: str
) -> None:
    path = write(tmp_path, {"fields.4": {"kind": "crossed", "of": parents}})
    with pytest.raises(LcSparkError, match=said):
        config_file.load(path)


def test_overrides_reach_nested_keys_lists_and_empty_sections(tmp_path: Path) -> None:
    path = write(tmp_path, {"lr": None})
    overrides = [
        "seed=11",
        "training.epochs=3",
        "training.hidden=[8, 4]",
        "lr.l2=1e-3",
        "systems=[lr]",
        "source.reject.gone=x IS NULL",
        "label=a=1",
    ]
    made = config_file.load(path, overrides)
    assert made.seed == 11
    assert made.training == Training(epochs=3, hidden=(8, 4))
    assert made.lr.l2 == (1e-3,)
    assert [system.name for system in made.systems] == ["lr"]
    assert made.source.reject == {"gone": "x IS NULL"}
    assert made.label == "a=1"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epochs", "write it as key=value"),
        ("systems.0.name=x", "'systems' holds a value, not keys"),
        ("label.x=1", "'label' holds a value, not keys"),
        ("training.epochs=[", "is not valid YAML"),
        ("training.epoch=1", "Did you mean 'epochs'?"),
        ("training.epochs=", "training.epochs: is None"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert said in error_of(write(tmp_path, {}), [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"no config file '{tmp_path / 'x.yaml'}'" in error_of(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: [", "is not valid YAML"),
        (b"- lr\n", "must hold keys and values"),
        (b"", "must hold keys and values"),
        (b"name: \xff\xfe", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    message = error_of(path)
    assert str(path) in message
    assert said in message


def test_the_command_line_prints_the_error_and_no_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"trainin": 1})
    monkeypatch.setattr("sys.argv", ["lc-spark", "run", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Error: {path}:")
    assert "Traceback" not in said


def test_the_digest_changes_with_any_setting_and_only_then(tmp_path: Path) -> None:
    base = config_file.load(write(tmp_path, {}))
    assert config_file.load(write(tmp_path, {})).digest() == base.digest()
    for override in ("seed=1", "training.epochs=9", "label=b", "shards.folds=3"):
        assert config_file.load(write(tmp_path, {}), [override]).digest() != base.digest()


def test_the_schema_is_printed_and_knows_every_key_of_a_config() -> None:
    printed = CliRunner().invoke(cli.app, ["schema"])
    assert printed.exit_code == 0
    schema = json.loads(printed.stdout)
    assert schema == config_file.schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    made = config_file.load(path)
    assert made.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_schema_knows_the_keys_of_every_config(path: Path) -> None:
    schema = config_file.schema()
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    sections = [(schema, data)]
    for key, value in data.items():
        reference = schema["properties"][key].get("$ref")
        if reference is not None:
            sections.append((schema["$defs"][reference.removeprefix("#/$defs/")], value))
    kinds = schema["properties"]["fields"]["items"]["discriminator"]["mapping"]
    for field in data["fields"]:
        sections.append((schema["$defs"][kinds[field["kind"]].removeprefix("#/$defs/")], field))
    assert len(sections) > len(data["fields"]) + 2
    for section, values in sections:
        assert set(values) <= set(section["properties"])
