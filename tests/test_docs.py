"""The pages in docs/, the README and the notebook: current, without dead links, and with commands that run."""

import importlib
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from commands import run_forked
from nbclient import NotebookClient

from cli.command import parse_command_line

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READMES = [PROJECT / "README.md", PROJECT / "README.zh-CN.md"]
NOTEBOOK = PROJECT / "notebooks" / "walkthrough.ipynb"
# By name, for mypy would take the file for two modules.
make_docs = importlib.import_module("docs.make_docs").main


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `train.py` in the page's bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "train.py" in words:
                yield words[words.index("train.py") + 1 :]


DOCS_COMMANDS = sorted({tuple(command) for page in PAGES for command in commands(page)})


def test_pages_and_pictures_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_docs(["--check"]) == 0, capsys.readouterr().out


def test_what_is_stale_is_named_and_then_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "docs"
    shutil.copytree(DOCS, folder)
    page, picture = folder / "alexnet.md", folder / "images" / "stages-alexnet.svg"
    text, drawing = page.read_text(encoding="utf-8"), picture.read_text(encoding="utf-8")
    page.write_text(text.replace("26,218,496", "26,218,497"), encoding="utf-8")
    picture.unlink()
    assert make_docs(["--check", "--folder", str(folder)]) == 1
    named = [line.partition(" is stale")[0] for line in capsys.readouterr().out.splitlines()]
    assert named == ["alexnet.md", str(Path("images") / "stages-alexnet.svg")]
    assert make_docs(["--folder", str(folder)]) == 0
    assert page.read_text(encoding="utf-8") == text
    assert picture.read_text(encoding="utf-8") == drawing


def test_measured_results_are_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "<!-- results lenet -->\n0.9\n<!-- /results -->\n<!-- table lenet -->\nold\n<!-- /table -->\n"
    page.write_text(text, encoding="utf-8")
    assert make_docs(["--folder", str(tmp_path)]) == 0
    assert page.read_text(encoding="utf-8").startswith(text[: text.index("old")])
    assert "| **total** | LeNet | 10 | **61,706** | **833,040** |\n<!-- /table -->" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table letnet -->\n<!-- /table -->", "there is no recipe 'letnet'"),
        ("![](images/stages-letnet.svg)", "there is no recipe 'letnet'"),
        ("<!-- table lenet -->\nno end", "page.md: a section"),
    ],
)
def test_a_mistake_in_a_page_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    assert make_docs(["--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"make_docs: error: {message}")
    assert error.count("\n") == 1
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("lenet", "28×28 14×14 10×10 5×5"),
        ("alexnet", "54×54 26×26 12×12 5×5"),
        ("vgg11", "112×112 56×56 28×28 14×14 7×7"),
        ("nin", "54×54 26×26 12×12 5×5 1×1"),
        ("googlenet", "48×48 24×24 12×12 6×6 3×3 1×1"),
    ],
)
def test_a_picture_shows_every_size_and_the_whole_cost(name: str, shapes: str) -> None:
    path = DOCS / "images" / f"stages-{name}.svg"
    assert path.stat().st_size < 12_000
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert set(shapes.split()) <= set(texts)
    shares = [int(text[:-1]) for text in texts if re.fullmatch(r"\d+%", text)]
    assert 190 <= sum(shares) <= 205  # parameters and FLOPs, each 100 but for rounding and shares below 1


@pytest.mark.parametrize("page", [*PAGES, *READMES, NOTEBOOK], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page == NOTEBOOK:
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    dead = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"https?://", link):
            continue
        if not target.exists() or (anchor and anchor not in headings(target)):
            dead.append(link)
    assert links
    assert not dead


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readmes_commands_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the commands expect to find: recipes by path, a file of the reader's own, an earlier run.
    shutil.copytree(PROJECT / "configs", tmp_path / "configs")
    (tmp_path / "my_changes.yaml").write_text("data: {batch_size: 64}\n", encoding="utf-8")
    last = tmp_path / "logs/alexnet/version_0/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    monkeypatch.chdir(tmp_path)
    found = list(commands(page))
    assert len(found) > 5
    for command in found:
        parse_command_line(command)


@pytest.mark.parametrize("arguments", DOCS_COMMANDS, ids=" ".join)
def test_the_pages_commands_build_what_they_train(arguments: tuple[str, ...], tmp_path: Path) -> None:
    # Builds network, data module and Trainer from all the flags, then stops.
    show = () if "--print_model" in arguments else ("--print_model",)
    answer = run_forked(*arguments, *show, folder=tmp_path)
    assert (answer.code, answer.err) == (0, "")
    assert re.search(r"^total +\w+ +10 +[\d,]+ +[\d,]+$", answer.out, re.MULTILINE)


def test_the_notebook_is_kept_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.filterwarnings("default")  # of the Jupyter client in this process; the notebook's own are looked for
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    streams = {(name, out.name): out.text for name, cell in cells.items() for out in cell.outputs if "text" in out}
    assert not {name: text for (name, stream), text in streams.items() if stream == "stderr"}
    shown = {name for name, cell in cells.items() for out in cell.outputs if "image/png" in out.get("data", {})}
    assert shown == {"load", "before", "after", "test", "show-mistakes", "curves"}
    assert "parameters: 156 in the table: 156" in streams["count", "stdout"]
    measured, recorded = re.findall(r"0\.\d{4}", streams["check", "stdout"])
    assert measured == recorded
    assert float(measured) > 0.5  # chance is 0.1
