"""The pages in docs/, the README and the notebook: current, without dead links, and with commands that run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import tree_sitter_powershell
from commands import DATA, ENVIRONMENT, run_forked
from nbclient import NotebookClient
from tree_sitter import Language, Parser

import compare
import demo
import export
import sweep
from cli.command import parse_command_line
from docs.course import exercises
from docs.course.check import COURSE, TEXTS, findings
from docs.course.check import main as check_answer
from docs.drawing import build
from docs.make_docs import main as make_docs
from inspection.receptive_field import WHOLE, receptive_fields
from inspection.table import describe

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CHINESE_PAGES = sorted((DOCS / "zh-CN").glob("*.md"))
READMES = [PROJECT / "README.md", PROJECT / "README.zh-CN.md"]
# Pages whose commands need files of the reader's own, or do something other than train.
GUIDES = [folder / name for folder in (DOCS, DOCS / "zh-CN") for name in ("guide.md", "weights.md")]
NOTEBOOK = PROJECT / "notebooks" / "walkthrough.ipynb"
CHINESE_NOTEBOOK = NOTEBOOK.with_suffix(".zh-CN.ipynb")


def commands(page: Path, program: str = "train.py") -> Iterator[list[str]]:
    """The arguments of every call of a program in the page's bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if program in words:
                yield words[words.index(program) + 1 :]


# What the other programs do with their arguments before anything is imported or read.
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "compare.py": compare.parse,
    "sweep.py": sweep.parse,
    "export.py": export.parser().parse_args,
    "demo.py": demo.parser().parse_args,
}
OTHERS = sorted(
    {
        (name, *words)
        for page in (*PAGES, *CHINESE_PAGES, *READMES)
        for name in PARSERS
        for words in commands(page, name)
    }
)
DOCS_COMMANDS = sorted({tuple(command) for page in PAGES if page not in GUIDES for command in commands(page)})


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
    assert "| **total** | LeNet | 10 |  | **61,706** | **833,040** |\n<!-- /table -->" in page.read_text(
        encoding="utf-8"
    )


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


@pytest.mark.parametrize(
    "page",
    [*PAGES, *CHINESE_PAGES, *READMES, NOTEBOOK, CHINESE_NOTEBOOK],
    ids=lambda page: f"{page.parent.name}/{page.name}",
)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
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


def headings(page: Path) -> list[str]:
    """The anchors that GitHub gives to a page's headings, in order."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines]


@pytest.mark.parametrize("page", [*READMES, *GUIDES], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_the_readmes_commands_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the commands expect to find: recipes by path, a file and a folder of the reader's own, an earlier run.
    shutil.copytree(PROJECT / "configs", tmp_path / "configs")
    (tmp_path / "my_changes.yaml").write_text("data: {batch_size: 64}\n", encoding="utf-8")
    (tmp_path / "path/to/photos").mkdir(parents=True)
    last = tmp_path / "logs/alexnet/version_0/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    monkeypatch.chdir(tmp_path)
    found = list(commands(page))
    assert len(found) > 1
    for command in found:
        parse_command_line(command)


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_the_other_programs_commands_are_understood(command: tuple[str, ...]) -> None:
    assert {name for name, *_ in OTHERS} == set(PARSERS)
    name, *arguments = command
    assert PARSERS[name](arguments)


def buildable(page: Path) -> Iterator[tuple[str, ...]]:
    """The trainings in a page, with what this machine lacks left out; others are run in the other tests."""
    for command in commands(page):
        if {"auto", "last", "predict", "test", "--help"} & set(command):
            continue
        words = iter(command)
        kept = [word for word in words if word not in ("--accelerator", "--devices", "--num_nodes") or not next(words)]
        yield tuple(str(DATA / "photos") if word == "path/to/photos" else word for word in kept)


@pytest.mark.parametrize(
    "arguments", sorted({command for page in [*READMES, *GUIDES] for command in buildable(page)}), ids=" ".join
)
def test_the_readmes_trainings_are_valid(arguments: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "configs", tmp_path / "configs")
    (tmp_path / "my_changes.yaml").write_text("data: {batch_size: 64}\n", encoding="utf-8")
    show = () if {"--print_model", "--print_config"} & set(arguments) else ("--print_config",)
    answer = run_forked(*arguments, *show, folder=tmp_path)
    assert (answer.code, answer.err) == (0, "")


@pytest.mark.slow
def test_the_two_files_of_the_guide_are_a_network_and_its_recipe(tmp_path: Path) -> None:
    for room in PROJECT.iterdir():
        if room.suffix in (".py", ".toml"):
            shutil.copy(room, tmp_path)
        elif room.name in ("configs", "tests") or (room / "__init__.py").exists():
            leave = shutil.ignore_patterns("*.ckpt", "__pycache__", "results", "images")
            shutil.copytree(room, tmp_path / room.name, ignore=leave)
    text = (DOCS / "guide.md").read_text(encoding="utf-8").partition("### Add a network")[2]
    for language, file in (("python", "models/mine.py"), ("yaml", "configs/mine.yaml")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", text.partition("###")[0], re.DOTALL)
        (tmp_path / file).write_text(block, encoding="utf-8")

    def train(*arguments: str) -> str:
        command = [sys.executable, "train.py", *arguments, "--data_dir", str(DATA), "--accelerator", "cpu"]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    assert "Test on 500 images" in train("--model", "mine", "--val_size", "200", "--max_epochs", "1")
    best = "logs/mine/version_0/checkpoints/best.ckpt"
    assert "test on 500 images" in train("test", "--ckpt_path", best)  # trusted: its class lies in models/
    recipes = "tests/test_launch.py::test_every_recipe_is_built"  # the tests go on to pass
    tested = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"{recipes}[mine]"]
    done = subprocess.run(tested, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert "1 passed" in done.stdout, done


def powershell(text: str) -> list[str]:
    """The commands of a text in PowerShell; what its grammar does not know fails."""
    root = Parser(Language(tree_sitter_powershell.language())).parse(text.encode()).root_node
    assert not root.has_error, text
    unread, found = [root], []
    while unread:
        node = unread.pop(0)
        unread = [*node.children, *unread]
        if node.type == "command":
            found.append((node.text or b"").decode())
    return found


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_powershell_does_what_bash_does(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    first, windows = (re.findall(rf"```{shell}\n(.*?)```", text, re.DOTALL)[0] for shell in ("bash", "powershell"))
    assert "&&" not in windows  # Windows' own PowerShell, 5.1, has no such operator
    linux = first.strip().replace("python3 -m", "py -m").replace(".venv/bin/", ".venv\\Scripts\\")
    assert powershell(windows) == linux.split(" && ")
    with pytest.raises(AssertionError, match="unclosed"):
        powershell('py -m "unclosed')


@pytest.mark.parametrize("arguments", DOCS_COMMANDS, ids=" ".join)
def test_the_pages_commands_build_what_they_train(arguments: tuple[str, ...], tmp_path: Path) -> None:
    # Builds network, data module and Trainer from all the flags, then stops.
    show = () if "--print_model" in arguments else ("--print_model",)
    answer = run_forked(*arguments, *show, folder=tmp_path)
    assert (answer.code, answer.err) == (0, "")
    assert re.search(r"^total +\w+ +10 +[\d,]+ +[\d,]+\.\d M$", answer.out, re.MULTILINE)


PICTURES = ["load", "before", "after", "open", "test", "show-mistakes", "curves", "five"]


def pictured(notebook: nbformat.NotebookNode) -> list[str]:
    """The cells that show a picture."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.id for cell in code if any("image/png" in output.get("data", {}) for output in cell.outputs)]


@pytest.mark.parametrize("path", [NOTEBOOK, CHINESE_NOTEBOOK], ids=lambda path: path.name)
def test_the_notebook_is_kept_with_its_results(path: Path) -> None:
    text, notebook = path.read_text(encoding="utf-8"), nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert pictured(notebook) == PICTURES
    assert len(text) < 1_500_000
    assert "Error" not in text
    assert not re.search(r"/(work|root|home|Users)/", text)


def test_the_notebooks_first_cell_finds_a_fresh_clone_and_installs_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "clone").symlink_to(PROJECT)
    (tmp_path / "packages" / "pip").mkdir(parents=True)
    (tmp_path / "packages" / "pip" / "__init__.py").touch()
    (tmp_path / "packages" / "pip" / "__main__.py").write_text("import sys; print(sys.argv[1:])", encoding="utf-8")
    first = next(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "packages")}
    for flags, printed in (["-S"], "['install', '-q', '-r', 'requirements.txt']\n"), ([], ""):  # -S: no packages
        command = [sys.executable, *flags, "-c", first]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, printed), done.stderr


@pytest.mark.filterwarnings("default")  # of the Jupyter client in this process; the notebook's own are looked for
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NOTEBOOK_EPOCHS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    streams = {(name, out.name): out.text for name, cell in cells.items() for out in cell.outputs if "text" in out}
    assert not {name: text for (name, stream), text in streams.items() if stream == "stderr"}
    assert pictured(notebook) == PICTURES
    assert "parameters: 156 in the table: 156" in streams["count", "stdout"]
    measured, recorded = re.findall(r"0\.\d{4}", streams["check", "stdout"])
    assert measured == recorded
    assert float(measured) > 0.5  # chance is 0.1


# Exercise -> what its starting point is told to look at, in order.
STARTING_POINTS = {
    "lenet-1": ["conv1_parameters", "conv1_flops", "conv2_parameters", "conv2_flops"],
    "lenet-2": ["shapes", "parameters"],
    "lenet-3": ["logits"],
    "alexnet-1": ["smallest_image", "image_for_55", "receptive_field", "share_of_first_linear"],
    "alexnet-2": ["alone", "known"],
    "vgg-1": ["three_3x3", "one_7x7", "receptive_field", "largest_layer"],
    "vgg-2": ["learns"],
    "vgg-3": ["official", "leaked"],
    "nin-1": ["linear"],
    "nin-2": ["dead", "gradient"],
    "googlenet-1": ["direct_5x5", "reduced_5x5", "block_parameters", "flops_factor"],
    "googlenet-2": ["kernel", "parameters"],
}


SLOWEST = "vgg-2"  # trains a VGG


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name == SLOWEST else name for name in exercises.EXERCISES],
)
def test_a_starting_point_gets_its_hint_and_a_solution_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "LIMIT", 600)
    file = name.replace("-", "_") + exercises.EXERCISES[name].suffix
    found = findings(name, COURSE / "start" / file)
    assert [finding.text for finding in found if not finding.right] == STARTING_POINTS[name]
    solved = findings(name, COURSE / "solutions" / file)
    assert [finding.text for finding in solved if not finding.right] == []


# A right answer to lenet-2: ReLU and flatten in `forward`, layers in an order of one's own.
FUNCTIONAL = """
from torch import nn
from torch.nn import functional as F


class Answer(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.hidden = nn.Linear(84, 10), nn.ModuleList([nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84)])
        self.pool, self.second = nn.MaxPool2d(2), nn.Conv2d(6, 16, kernel_size=5)
        self.first = nn.Conv2d(1, 6, kernel_size=5, padding=2)

    def forward(self, images):
        x = self.pool(F.relu(self.second(self.pool(F.relu(self.first(images)))))).flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.out(x)
"""


def test_answers_that_are_nearly_right_are_not_accepted(tmp_path: Path) -> None:
    numbers = (COURSE / "solutions" / "alexnet_1.py").read_text(encoding="utf-8")
    (tmp_path / "numbers.py").write_text(numbers.replace("11 + 4 * 54", "226"), encoding="utf-8")
    found = findings("alexnet-1", tmp_path / "numbers.py")
    assert [finding.text for finding in found if not finding.right] == ["image_for_55"]
    (tmp_path / "each.py").write_text(
        "def prepare(images, train_images):\n"
        "    pixels = images[:, None].float()\n"
        "    return (pixels - pixels.mean((2, 3), True)) / pixels.std((2, 3), keepdim=True)\n",
        encoding="utf-8",
    )
    found = findings("alexnet-2", tmp_path / "each.py")  # each image by its own
    assert [finding.text for finding in found if not finding.right] == ["known"]
    recipe = (COURSE / "solutions" / "nin_2.yaml").read_text(encoding="utf-8")
    other = recipe.replace("models.nin.NiN\n", "models.nin.NiN\n    init_args: {dropout: 0.0}\n")
    (tmp_path / "other.yaml").write_text(other, encoding="utf-8")
    assert [finding.text for finding in findings("nin-2", tmp_path / "other.yaml")] == ["kept"]  # a NiN of its own
    narrow = FUNCTIONAL.replace("padding=2", "padding=1").replace("5 * 5", "4 * 4")
    (tmp_path / "padding.py").write_text(narrow, encoding="utf-8")
    found = findings("lenet-2", tmp_path / "padding.py")
    assert [finding.text for finding in found if not finding.right] == ["shapes", "parameters"]
    recipe = (COURSE / "solutions" / "vgg_2.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("batch_norm: true", "blocks: 1"),
        ("batch_norm: true", "no_hidden_layers: true"),
        ("models.vgg.VGG", "mine.VGG"),
    ):
        (tmp_path / "shallow.yaml").write_text(recipe.replace(old, new), encoding="utf-8")
        first = next(exercises.vgg_2(tmp_path / "shallow.yaml"))  # the next one trains
        assert (first.text, first.right) == ("kept", False)


def test_answers_that_are_right_in_another_way_are_accepted(tmp_path: Path) -> None:
    numbers = (COURSE / "solutions" / "alexnet_1.py").read_text(encoding="utf-8")
    (tmp_path / "rounded.py").write_text(re.sub(r"(?<=share_of_first_linear = ).*", "0.87", numbers), encoding="utf-8")
    assert all(finding.right for finding in findings("alexnet-1", tmp_path / "rounded.py"))
    lenet = (COURSE / "start" / "nin_1.py").read_text(encoding="utf-8")
    ending = "nin_block(32, 10, kernel_size=3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()"
    whole = re.sub(r"nn.Flatten\(\), nn.Linear.*(?=\)$)", ending, lenet, flags=re.MULTILINE)
    assert whole != lenet
    (tmp_path / "whole.py").write_text(f"from models.nin import nin_block\n{whole}", encoding="utf-8")
    found = findings("nin-1", tmp_path / "whole.py")  # NiN's own last block, of three convolutions
    assert [finding.text for finding in found if not finding.right] == []
    assert {"given": "16,358"} in [finding.values for finding in found]
    (tmp_path / "functional.py").write_text(FUNCTIONAL, encoding="utf-8")
    assert all(finding.right for finding in findings("lenet-2", tmp_path / "functional.py"))
    recipe = (COURSE / "solutions" / "vgg_2.yaml").read_text(encoding="utf-8")
    (tmp_path / "spelled.yaml").write_text(recipe.replace("batch_norm: true", "blocks: 5"), encoding="utf-8")
    assert next(exercises.vgg_2(tmp_path / "spelled.yaml")).right
    recipe = (COURSE / "solutions" / "nin_2.yaml").read_text(encoding="utf-8")
    (tmp_path / "tenth.yaml").write_text(recipe.replace("bias: 1.0", "bias: 1e-1"), encoding="utf-8")  # a text in YAML
    first = list(islice(exercises.nin_2(tmp_path / "tenth.yaml"), 3))  # the next one trains
    assert [finding.text for finding in first if finding.right] == ["kept", "dead", "gradient"]


def test_every_finding_is_told_in_both_languages() -> None:
    assert list(TEXTS) == ["common", *exercises.EXERCISES]
    for texts in TEXTS.values():
        for text in texts.values():
            for english, chinese in text.values() if isinstance(text, dict) else [text]:
                assert sorted(re.findall(r"{.*?}", english)) == sorted(re.findall(r"{.*?}", chinese))
                assert not re.search("[\u4e00-\u9fff]", english)


def test_every_exercise_stands_on_its_page() -> None:
    assert len(exercises.EXERCISES) == 12
    for name in exercises.EXERCISES:
        assert f"| `{name}` |" in (DOCS / f"{name.rpartition('-')[0]}.md").read_text(encoding="utf-8")


def test_an_answer_is_reported_with_exit_code_and_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = tmp_path / "mine.py"
    answer.write_text((COURSE / "start" / "lenet_1.py").read_text(encoding="utf-8").replace("= 0", "= 156", 1))
    assert check_answer(["lenet-1", str(answer), "--language", "en"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"lenet-1: {answer.resolve().as_posix()}"  # on Windows it may lie on another drive
    assert lines[1] == "  right     conv1_parameters = 156"
    assert lines[2].startswith("  look at   conv1_flops = 0: 2 × the weights")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert check_answer(["lenet-1", str(COURSE / "solutions" / "lenet_1.py")]) == 0
    assert capsys.readouterr().out.endswith("lenet-1 已完成。\n")
    # A time limit that is not lifted would end this process long after the check.
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.is_alive()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lenet-9", "", "there is no exercise 'lenet-9'; there are: lenet-1, "),
        ("lenet-1", None, "mine.py: a .py file with the answer was expected"),
        ("lenet-1", "conv1_parameters =\n", "mine.py, line 1: SyntaxError: invalid syntax"),
        ("lenet-1", "conv1_parameters = 156\n", "AttributeError: module 'answer' has no attribute 'conv1_flops'"),
        (
            "lenet-2",
            "class Answer:\n    def __init__(self):\n        self.x = 1 / 0\n",
            "mine.py, line 3: ZeroDivision",
        ),
        ("nin-2", "model: {net: models.nin.NiN, nothing: 1}\noutput_bias: 1\n", "nothing"),
        ("nin-2", "model: {net: models.nin.NiN, output_bias: .inf}\n", "mine.yaml: ValueError: output_bias=inf"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, message: str
) -> None:
    answer = tmp_path / ("mine.yaml" if name == "nin-2" else "mine.py")
    if content is not None:
        answer.write_text(content, encoding="utf-8")
    assert check_answer([name, str(answer)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_receptive_field_of_a_branch_is_the_largest_and_a_known_network_has_its_published_one() -> None:
    net, shape = build("vgg16")
    assert receptive_fields(net, shape)["features.30"] == 212  # Araujo et al. 2019, doi:10.23915/distill.00021
    net, shape = build("googlenet")
    assert receptive_fields(net, shape)["features.stage2"] == 27
    assert (
        receptive_fields(net, shape)["features.stage3"] == 27 + 2 * 4 * 8 + 2 * 8
    )  # two blocks by their 5x5, a pooling
    assert receptive_fields(net, shape)["classifier.1"] == WHOLE


@pytest.mark.parametrize(("windows", "field"), [(4, 3 + 6), (1, WHOLE), (3, WHOLE)])
def test_the_receptive_field_of_an_adaptive_pooling(windows: int, field: int) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.AdaptiveAvgPool2d(windows))
    assert receptive_fields(net, (1, 28, 28))["1"] == field


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (torch.nn.Conv2d(1, 1, 11, stride=4), "Conv2d 11×11 stride 4"),
        (torch.nn.Conv2d(1, 1, (1, 7)), "Conv2d 1×7"),
        (torch.nn.Conv2d(1, 1, (3, 5), stride=(1, 2)), "Conv2d 3×5 stride 1×2"),
        (torch.nn.MaxPool2d((2, 1)), "MaxPool2d 2×1 stride 2×1"),
        (torch.nn.AvgPool2d(3, stride=1), "AvgPool2d 3×3"),
    ],
)
def test_a_layer_is_named_with_both_sides(layer: torch.nn.Module, words: str) -> None:
    assert describe(layer) == words


PAIRS = [tuple(READMES), *((page, DOCS / "zh-CN" / page.name) for page in PAGES)]


def code_blocks(text: str) -> list[str]:
    """The blocks of code without comments."""
    blocks = re.findall(r"```(?:bash|python|yaml)\n(.*?)```", text, re.DOTALL)
    return [re.sub(r"(?m) *# .*$", "", block) for block in blocks]


def numbers(text: str) -> Counter[str]:
    """Every number of two digits or more, and how often it stands there."""
    return Counter(
        re.findall(r"(?<![A-Za-z])\d[\d.,]*\d", re.sub(r"```.*?```|\]\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL))
    )


def links(page: Path) -> list[tuple[str, int]]:
    """Each link that isn't to the other language: its target, and which of the target's headings it leads to."""
    found = []
    for link in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            found.append((link, 0))
            continue
        target = (page.parent / path).resolve() if path else page
        heading = headings(target).index(anchor) if anchor else 0
        shown = target.relative_to(PROJECT).as_posix()
        found.append((shown.replace("docs/zh-CN", "docs").replace(".zh-CN.", "."), heading))
    return sorted(link for link in found if link[0] != "README.md" or link[1])


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_chinese_is_level_with_english(english: Path, chinese: Path) -> None:
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    levels = [re.findall(r"^#+(?= )", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE) for text in texts]
    assert levels[1] == levels[0]
    assert code_blocks(texts[1]) == code_blocks(texts[0])
    first, second = map(numbers, texts)
    assert (first - second, second - first) == (Counter(), Counter())
    assert links(chinese) == links(english)
    regions = [re.findall(r"<!-- .*? -->", text) for text in texts]
    assert regions[1] == regions[0]
    # Bullets, numbered questions and rows of tables.
    shapes = [re.findall(r"^ *(?:-|\d\.|\|(?=[^-]))(?= )", text, re.MULTILINE) for text in texts]
    assert shapes[1] == shapes[0]
    asides = [sorted(re.findall(r"`--[\w.]+|`\w+[/.][\w./]+`", text)) for text in texts]
    assert asides[1] == asides[0]


def test_the_chinese_notebook_has_the_code_of_the_english_one() -> None:
    english, chinese = (nbformat.read(path, 4) for path in (NOTEBOOK, CHINESE_NOTEBOOK))
    assert [cell.id for cell in chinese.cells] == [cell.id for cell in english.cells]
    for cell, other in zip(english.cells, chinese.cells, strict=True):
        if cell.cell_type == "code":
            assert other.source == cell.source
        else:
            assert re.search("[\u4e00-\u9fff]", other.source)
            assert numbers(other.source) == numbers(cell.source)
    assert chinese.metadata == english.metadata


def test_the_messages_are_those_of_the_code() -> None:
    folders = ("cli", "launch", "checkpoints", "datamodules", "callbacks", "weights", "models")
    files = [PROJECT / "errors.py", *(path for folder in folders for path in (PROJECT / folder).rglob("*.py"))]
    source = re.sub(r'"\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in files))
    source = re.sub(r"{.*?}", "…", source)
    pages = [DOCS / "messages.md", DOCS / "zh-CN" / "messages.md"]
    listed, chinese = (re.findall(r"^\| `(.+?)` \|", page.read_text(encoding="utf-8"), re.MULTILINE) for page in pages)
    assert len(listed) > 10 and chinese == listed
    for message in listed:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        assert re.search(".{0,80}?".join(parts), source), message
