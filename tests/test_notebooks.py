"""The notebooks run from the first cell to the last, and git has none of their outputs."""

import copy
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import environment
from nbclient import NotebookClient
from nbstripout import strip_output

FOLDER = Path(__file__).parent.parent / "notebooks"
# name -> figures; the third reads what the second has made
NOTEBOOKS = {"from_raw_row_to_score": 0, "reading_a_model": 3, "reading_experiments": 1}


def read(name: str) -> nbformat.NotebookNode:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    return nbformat.from_dict(json.loads(text))  # type: ignore[no-any-return, no-untyped-call]


def is_stripped(notebook: nbformat.NotebookNode) -> bool:
    stripped = strip_output(
        copy.deepcopy(notebook), keep_output=False, keep_count=False, keep_id=True
    )
    return bool(stripped == notebook)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a kernel that is this interpreter, and room for the workspaces."""
    folder = tmp_path_factory.mktemp("notebooks")
    kernel = folder / "jupyter" / "kernels" / "tested"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "tested", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return folder


def test_no_notebook_has_outputs_in_git() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)
    for name in NOTEBOOKS:
        assert is_stripped(read(name)), f"run: nbstripout notebooks/{name}.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in set(os.environ) - set(environment()):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("LC_SPARK_NOTEBOOK_WORKSPACE", str(folder / "workspace"))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = read(name)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=1750, kernel_name="tested", resources=where).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    figures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(figures) == NOTEBOOKS[name]
    tables = [o for o in outputs if "text/html" in o.get("data", {})]
    assert len(tables) >= 5
    assert not is_stripped(notebook)
