"""The house as it is built: which room imports which, how large its parts are, and what stays light."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
NETWORKS = {"weights", "lit_modules", "datamodules", "checkpoints", "errors"}
# Each room, or door, and what of this project it may import. A module by its full name: that one alone of its room.
MAY_IMPORT = {
    "errors": set(),
    "models": set(),
    "optimizers": set(),
    "checkpoints": {"errors"},
    "lit_modules": {"checkpoints", "errors"},
    "datamodules": {"checkpoints", "errors"},
    "inspection": {"errors"},
    "weights": NETWORKS | {"runs.record"},
    "pictures": NETWORKS | {"inspection"},
    "callbacks": NETWORKS | {"inspection", "pictures", "runs.record", "runs.settings"},
    "cli": {"errors"},
    "runs": {"cli", "errors"},
    "launch": NETWORKS | {"callbacks", "inspection", "pictures", "cli", "runs.record", "runs.settings"},
    "train": {"launch", "cli", "errors"},
    "compare": {"runs", "cli", "errors"},
    "sweep": {"runs", "cli", "errors"},
    "export": {"weights", "cli", "errors"},
    "demo": {"pictures", "cli", "errors"},
    "docs": NETWORKS | {"models", "inspection", "cli"},
}
CORE_LINES, FILE_LINES, CLASS_LINES, FUNCTION_LINES, CLI_LINES = 1300, 350, 215, 80, 150


@cache
def product() -> tuple[Path, ...]:
    """Every Python file of the project, tests and benchmarks aside."""
    try:
        command = ["git", "-c", "safe.directory=*", "ls-files", "*.py"]
        listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.split()
    except OSError:
        listed = []  # no git
    found = [*REPO.glob("*.py"), *(path for room in REPO.glob("*/__init__.py") for path in room.parent.rglob("*.py"))]
    paths = [Path(name) for name in listed] or [path.relative_to(REPO) for path in found]  # no repository, but a ZIP
    return tuple(path for path in paths if path.parts[0] not in ("tests", "benchmarks") and (REPO / path).exists())


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((REPO / path).read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """The folder; of a file in the root, its name."""
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside of functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their room"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Those of other rooms of this project."""
    rooms = {room(path) for path in product()} | {"tests", "benchmarks"}
    return {name for name in imports(path) if name.partition(".")[0] in rooms - {room(path)}}


@pytest.mark.parametrize("path", ["", os.environ["PATH"]], ids=["without git", "without a repository"])
def test_what_is_downloaded_without_its_history_has_the_same_files(tmp_path: Path, path: str) -> None:
    for file in (*product(), Path("tests/test_structure.py")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / file, tmp_path / file)
    (tmp_path / ".venv" / "package").mkdir(parents=True)
    (tmp_path / ".venv" / "package" / "__init__.py").touch()
    command = [sys.executable, "-c", "import test_structure; print(*test_structure.product())"]
    environment = os.environ | {"PATH": path}
    done = subprocess.run(command, cwd=tmp_path / "tests", env=environment, capture_output=True, text=True, timeout=60)
    assert sorted(done.stdout.split()) == sorted(map(str, product())), done.stderr


def test_no_test_is_part_of_the_shells_job() -> None:
    job = "SLURM_NTASKS RANK LOCAL_RANK WORLD_SIZE NODE_RANK GROUP_RANK MASTER_ADDR TORCHELASTIC_RUN_ID PL_GLOBAL_SEED"
    held = dict.fromkeys([*job.split(), "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"], "2")
    command = [sys.executable, "-c", "import conftest, commands; print(*commands.ENVIRONMENT)"]
    environment = os.environ | held | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO / "tests", env=environment, capture_output=True, text=True, timeout=60)
    assert "OMP_NUM_THREADS" in done.stdout.split() and not held.keys() & set(done.stdout.split()), done.stderr


def test_every_room_has_its_rule() -> None:
    assert {room(path) for path in product()} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_one_way(name: str) -> None:
    allowed = MAY_IMPORT[name]
    for path in product():
        for module in own_imports(path) if room(path) == name else ():
            parts = module.split(".")
            known = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
            narrowed = len(parts) == 1 and any(rule.startswith(f"{module}.") for rule in allowed)
            assert known & allowed or narrowed, f"{path} imports {module}"


def test_no_two_rooms_import_each_other_by_whatever_way() -> None:
    graph: dict[str, set[str]] = {}
    for path in product():
        graph.setdefault(room(path), set()).update(module.partition(".")[0] for module in own_imports(path))
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_networks_and_optimizers_need_torch_alone() -> None:
    for path in product():
        if room(path) in ("models", "optimizers"):
            outside = {module.partition(".")[0] for module in imports(path)} - sys.stdlib_module_names
            assert outside <= {"torch", room(path)}, path


LIGHT = ["train", "compare", "sweep", "export", "demo"]
LIGHT += [".".join(path.with_suffix("").parts) for path in product() if room(path) == "cli" and path.stem != "__init__"]


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_at_once_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'lightning', 'numpy', 'optuna'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_the_root_holds_the_doors_alone() -> None:
    root = sorted(path.name for path in product() if len(path.parts) == 1)
    assert root == ["compare.py", "demo.py", "errors.py", "export.py", "sweep.py", "train.py"]


def test_nothing_is_longer_than_one_reads_at_a_time() -> None:
    for path in product():
        assert lines(path) <= FILE_LINES, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                most = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
                most = CLI_LINES if node.name == "ClassifierCLI" else most
                assert length <= most, f"{path}: {node.name} has {length} lines"


def test_the_core_is_read_in_half_an_hour() -> None:
    rooms = ("models", "lit_modules", "datamodules")
    core = [path for path in product() if room(path) in rooms and not {"files", "execution"} & set(path.parts)]
    assert len(core) >= 10
    assert sum(map(lines, [Path("train.py"), *core])) <= CORE_LINES


def test_the_readme_counts_the_lines_of_its_half_hour() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    route, number = re.findall(r"Half an hour shows(.*?): (\d+) lines", text, re.DOTALL)[0]
    files = [Path(name) for name in re.findall(r"`([\w/]+\.\w+)`", route)]
    (fit,) = (node for node in tree(Path("launch/verbs.py")).body if getattr(node, "name", "") == "fit")
    total = sum(lines(path) for path in files if path.name != "verbs.py") + len(ast.unparse(fit).splitlines())
    assert len(files) == 8
    assert abs(total - int(number)) <= 10


def lines(path: Path) -> int:
    return len((REPO / path).read_text(encoding="utf-8").splitlines())
