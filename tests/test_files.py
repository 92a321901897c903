"""Files of a workspace behave alike in a folder and in a store behind a URI (here: memory:)."""

import uuid
from pathlib import Path

import pytest
import torch
from upath import UPath

from lc_spark import files
from lc_spark.encoder import Vocabulary
from lc_spark.field_map import FieldInfo, FieldMap
from lc_spark.files import AnyPath
from lc_spark.training import checkpoint, models


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    return tmp_path if request.param == "folder" else files.as_path(f"memory://{uuid.uuid4()}/ws")


@pytest.mark.parametrize("text", ["/data/ws", "file:/data/ws", "file:///data/ws"])
def test_a_local_place_is_an_absolute_path_whatever_its_spelling(text: str) -> None:
    assert files.as_path(text) == Path("/data/ws")
    assert files.uri(files.as_path(text)) == "file:///data/ws"


def test_a_relative_folder_is_of_the_current_one_and_a_uri_stays(tmp_path: Path) -> None:
    assert files.as_path("workspace/x") == Path.cwd() / "workspace" / "x"
    there = files.as_path("s3a://bucket/folder")
    assert isinstance(there, UPath)
    assert files.uri(there / "shards") == "s3a://bucket/folder/shards"


def test_what_is_written_is_read_copied_renamed_and_removed(place: AnyPath) -> None:
    files.write_text(place / "a" / "one.json", "first")
    files.write_text(place / "a" / "one.json", "second")
    files.write_text(place / "a" / "two.json", "2")
    assert [p.name for p in files.children(place / "a", "*.json")] == ["one.json", "two.json"]
    files.copy(place / "a" / "one.json", place / "a" / "three.json")
    assert (place / "a" / "three.json").read_text() == "second"
    files.write_text(place / "b" / "old.json", "gone")
    files.rename(place / "a", place / "b")
    assert [p.name for p in files.children(place / "b", "*")] == [
        "one.json",
        "three.json",
        "two.json",
    ]
    assert not files.children(place / "a", "*")
    with files.local(place / "b" / "one.json") as path:
        assert path.read_text() == "second"
    files.remove(place / "b")
    files.remove(place / "b")
    assert not files.children(place / "b", "*")


def test_maps_vocabularies_models_and_checkpoints_come_back(place: AnyPath) -> None:
    field_map = FieldMap((FieldInfo("site", "categorical", 4, column="site"),), parent="abc")
    field_map.write(place / "field_map.json")
    read = FieldMap.read(place / "field_map.json")
    assert (read, read.fingerprint, read.parent) == (field_map, field_map.fingerprint, "abc")
    Vocabulary({}).write(place / "vocabulary.parquet")
    assert Vocabulary.read(place / "vocabulary.parquet").entries == {}
    model = models.Lr.from_weights(torch.arange(4.0).double().numpy(), 0.5)
    models.save(model, place / "models" / "lr", field_map.fingerprint, {"l2": 1})
    again, description = models.load(place / "models" / "lr")
    assert torch.equal(again.state_dict()["weight"], model.state_dict()["weight"])
    assert description["l2"] == 1
    for epoch in (1, 2):
        tensors = {"step": torch.tensor(epoch)}
        checkpoint.save(place / "checkpoint", epoch, {"seed": 1}, tensors, {"done": epoch})
    assert checkpoint.newest(place / "checkpoint", {"seed": 1}) == 2
    found, progress = checkpoint.load(place / "checkpoint", 2, torch.device("cpu"))
    assert (int(found["step"]), progress) == (2, {"done": 2})
    assert checkpoint.newest(place / "checkpoint", {"seed": 2}) == 0
    assert len(files.children(place, "checkpoint.set_aside/*/*")) == 2
