"""Turns the state of a training run into a folder an epoch, and back: safetensors and JSON.

A checkpoint is there whole or not at all: it is written under another name and renamed. Only rank
0 writes; every rank reads.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS_FILE = "state.safetensors"
PROGRESS_FILE = "state.json"


def save(
    folder: Path,
    epoch: int,
    identity: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write folder/epoch-N and remove the one before it.

    identity says what the run is made of (settings, data, ranks); progress is any further JSON.
    """
    new, final = folder / f"new-{epoch:04d}", folder / f"epoch-{epoch:04d}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, new / TENSORS_FILE)
    content = {"identity": dict(identity), "progress": dict(progress)}
    (new / PROGRESS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for name in (TENSORS_FILE, PROGRESS_FILE):
        with (new / name).open("rb") as file:
            os.fsync(file.fileno())
    os.rename(new, final)
    for old in _finished(folder):
        if old != final:
            shutil.rmtree(old)


def newest(folder: Path, identity: Mapping[str, Any]) -> int:
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
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    print(
        f"The checkpoint in {folder} is of another run ({', '.join(differing)} differ): set aside "
        f"as {aside}, training starts anew.",
        flush=True,
    )
    return 0


def load(
    folder: Path, epoch: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the progress of folder/epoch-N."""
    path = folder / f"epoch-{epoch:04d}"
    content = json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8"))
    return load_file(path / TENSORS_FILE, device=str(device)), content["progress"]


def remove(folder: Path) -> None:
    """Remove the checkpoints of a run that has ended well."""
    shutil.rmtree(folder, ignore_errors=True)


def _finished(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))
