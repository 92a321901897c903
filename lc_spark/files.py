"""Files of a workspace that may lie in a local folder or behind a URI (s3a:, hdfs:, abfss:).

A local place is a pathlib Path, another one a UPath of universal_pathlib, which has the same
methods over fsspec. Here is what the two do not share. Spark goes through Hadoop's file systems.
"""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

AnyPath = Path | UPath


def as_path(place: str) -> AnyPath:
    """Return a folder or file: absolute for a local path or a file: URI, else as the URI says."""
    local = place.removeprefix("file:") if place.startswith("file:/") else place
    if "://" in local:
        return UPath(local)
    return Path(f"/{local.lstrip('/')}" if local != place else local).resolve()


def uri(path: AnyPath) -> str:
    """Return what Spark and petastorm are given: without a scheme they would take their default."""
    return f"file://{path}" if isinstance(path, Path) else str(path)


def children(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Return the files of a folder that fit a pattern, in order, as they lie there now."""
    if isinstance(folder, UPath):
        folder.fs.invalidate_cache()  # fsspec remembers listings, and Spark writes past it
    return sorted(folder.glob(pattern), key=str)


def write_whole(path: AnyPath, content: bytes) -> None:
    """Write a file so that a reader never meets half of it."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        try:
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)  # the part that found room on a full disk
    else:
        path.write_bytes(content)  # an object store shows an object when it is whole


def write_text(path: AnyPath, text: str) -> None:
    """Write a text file so that a reader never meets half of it."""
    write_whole(path, text.encode("utf-8"))


def copy(source: AnyPath, target: AnyPath) -> None:
    """Copy a file, from and to anywhere."""
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new)


def remove(folder: AnyPath) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)
        folder.fs.invalidate_cache()


def rename(folder: AnyPath, new: AnyPath) -> None:
    """Give a folder another name; what had that name before is removed."""
    remove(new)
    if isinstance(folder, Path):
        folder.rename(str(new))
    else:
        folder.fs.mv(str(folder), str(new), recursive=True)
        folder.fs.invalidate_cache()


@contextmanager
def local(path: AnyPath) -> Iterator[Path]:
    """Give a file as one of this machine, for libraries that read nothing else."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder, path.name)
        copy(path, copied)
        yield copied


@contextmanager
def package_folder() -> Iterator[Path]:
    """Give the folder of this library, unpacked where it was imported from a zip (--py-files)."""
    package = Path(__file__).parent
    if package.is_dir():
        yield package
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(package.parent) as archive:
        archive.extractall(folder)
        yield Path(folder, package.name)
