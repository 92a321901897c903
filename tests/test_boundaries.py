"""Who may import what, and how long a part may be: the boundaries that keep the parts apart."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lc_spark"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))

# library -> the only modules that import it
ONLY_IN = {
    "mlflow": {"tracking.py", "registry.py", "model_code.py"},
    "delta": {"tables.py"},
    "petastorm": {"training/loader.py"},
    "matplotlib": {"figures.py", "tracking.py", "report.py"},
    "jinja2": {"report.py"},
    "typer": {"cli.py"},
    "pydantic": {
        "config_file.py",
        "config.py",
        "daily_settings.py",
        "field_kinds.py",
        "source_settings.py",
        "systems.py",
    },
    "upath": {"files.py"},
    "yaml": {"config_file.py"},
    "safetensors": {"training/tensors.py"},
}
# Spark and torch meet here: LR on shards, the launch of the ranks, the scoring of rows.
MEET = {"training/lr.py", "training/launch.py", "score.py"}
LONGEST_MODULE = 300
LONGEST_FUNCTION = 60


def imports(path: Path) -> set[str]:
    """Return all modules that a file imports, at the top or inside functions, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            assert node.module is not None, "an absolute import names its module"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def reachable(module: str) -> set[str]:
    """Return the libraries that importing a module of ours brings in, through all of ours."""
    seen: set[str] = set()
    waiting, found = [module], set[str]()
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        found |= libraries(PACKAGE / at)
        for name in imports(PACKAGE / at):
            if name.startswith("lc_spark."):
                file = name.removeprefix("lc_spark.").replace(".", "/") + ".py"
                waiting += [file] if (PACKAGE / file).is_file() else []
    return found


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of lines of each function, its decorators left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None, "parsed from a file"
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_module(library: str) -> None:
    using = {module for module in MODULES if library in libraries(PACKAGE / module)}
    assert using, f"nothing imports {library} any more: take it out of this test"
    assert using <= ONLY_IN[library]


def test_features_never_import_torch() -> None:
    for module in MODULES:
        if module.startswith("features/"):
            assert "torch" not in reachable(module), module


def test_training_never_imports_spark_but_where_they_meet() -> None:
    for module in MODULES:
        if module.startswith("training/") and module not in MEET:
            assert "pyspark" not in libraries(PACKAGE / module), module


@pytest.mark.parametrize("module", ["training/loop.py", "training/scorer.py"])
def test_what_runs_on_a_rank_or_serves_a_model_needs_no_spark(module: str) -> None:
    assert "torch" in reachable(module)
    assert not {"pyspark", "delta"} & reachable(module)


@pytest.mark.parametrize("module", ["encoder.py", "field_map.py", "errors.py", "config.py"])
def test_what_both_sides_share_needs_neither(module: str) -> None:
    assert not {"pyspark", "torch", "mlflow"} & reachable(module)


def test_spark_and_torch_meet_only_in_three_modules() -> None:
    torch_side = ("lc_spark.training.models", "lc_spark.training.learner")
    meeting = set()
    for module in MODULES:
        found = imports(PACKAGE / module)
        torch = "torch" in {name.partition(".")[0] for name in found} or found & set(torch_side)
        if torch and "pyspark" in {name.partition(".")[0] for name in found}:
            meeting.add(module)
    # evaluate counts the parameters of a system with training.models, and touches no tensor.
    assert meeting <= MEET | {"evaluate.py"}
    assert "torch" not in libraries(PACKAGE / "evaluate.py")


def test_nothing_imports_jobs_and_jobs_import_only_the_library() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        if path.parent != ROOT / "jobs":
            assert "jobs" not in libraries(path), path
    assert len(JOBS) == 8
    for path in JOBS:
        assert libraries(path) == {"lc_spark"}, path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 35, path


def test_no_unsafe_reader_of_files_is_imported_or_called() -> None:
    unsafe = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for module in MODULES:
        assert not unsafe & libraries(PACKAGE / module), module
        tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
        names = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not {"torch.load", "torch.save", "np.load", "yaml.load", "eval", "exec"} & names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_and_its_functions_stay_short(module: str) -> None:
    lines = len((PACKAGE / module).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE
    for name, length in functions(PACKAGE / module):
        assert length <= LONGEST_FUNCTION, f"{name} has {length} lines"
