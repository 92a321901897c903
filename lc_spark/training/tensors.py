"""Tensors as safetensors files, on local disk or behind a URI; nothing is ever unpickled."""

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lc_spark import files
from lc_spark.files import AnyPath


def save_tensors(tensors: Mapping[str, Tensor], path: AnyPath) -> None:
    """Write tensors by name, whole or not at all; raises OSError when there is no room."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if isinstance(path, Path):  # without a second copy of them in memory
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        try:
            safetensors.torch.save_file(contiguous, new)
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        finally:
            new.unlink(missing_ok=True)  # the part that found room on a full disk
    else:
        files.write_whole(path, safetensors.torch.save(contiguous))


def load_tensors(path: AnyPath, device: str = "cpu") -> dict[str, Tensor]:
    """Read what save_tensors wrote."""
    with files.local(path) as file:
        return safetensors.torch.load_file(file, device=device)
