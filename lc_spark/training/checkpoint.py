"""Turns the state of a training run into a folder an epoch, and back: safetensors and JSON.

A checkpoint counts from the moment on that its JSON is there, the last file to be written. Only
rank 0 writes; every rank reads.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lc_spark import files
from lc_spark.files import AnyPath
from lc_spark.training.tensors import load_tensors, save_tensors

TENSORS_FILE = "state.safetensors"
PROGRESS_FILE = "state.json"


def save(
    folder: AnyPath,
    epoch: int,
    identity: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write folder/epoch-N and remove the one before it.

    identity says what the run is made of (settings, data, ranks); progress is any further JSON.
    """
    path = folder / f"epoch-{epoch:04d}"
    (path / PROGRESS_FILE).unlink(missing_ok=True)
    save_tensors(tensors, path / TENSORS_FILE)
    content = {"identity": dict(identity), "progress": dict(progress)}
    files.write_text(path / PROGRESS_FILE, json.dumps(content, indent=1))
    for old in _finished(folder):
        if old != path:
            files.remove(old)


def newest(folder: AnyPath, identity: Mapping[str, Any]) -> int:
    """Return the epoch of the last checkpoint, 0 when there is none to go on from.

    One of another identity is set aside (folder.set_aside, replacing an earlier one) and said so.
    """
    finished = _finished(folder)
    if not finished:
        return 0
    content = json.loads((finished[-1] / PROGRESS_FILE).read_text(encoding="utf-8"))
    differing = [key for key, value in identity.items() if content["identity"].get(key) != value]
    if not differing:
        return int(finished[-1].name.removeprefix("epoch-"))
    aside = folder.with_name(f"{folder.name}.set_aside")
    files.rename(folder, aside)
    print(
        f"The checkpoint in {folder} is of another run ({', '.join(differing)} differ): set aside "
        f"as {aside}, training starts anew.",
        flush=True,
    )
    return 0


def load(
    folder: AnyPath, epoch: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the progress of folder/epoch-N."""
    path = folder / f"epoch-{epoch:04d}"
    content = json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8"))
    return load_tensors(path / TENSORS_FILE, str(device)), content["progress"]


def remove(folder: AnyPath) -> None:
    """Remove the checkpoints of a run that has ended well."""
    files.remove(folder)


def _finished(folder: AnyPath) -> list[AnyPath]:
    """Return the folders of whole checkpoints, the oldest first."""
    return [path.parent for path in files.children(folder, f"epoch-*/{PROGRESS_FILE}")]
