"""Rubbish thrown at everything that reads: never a traceback, never a hang, never a silently wrong data set.

Whatever is not refused must be right; whatever is refused must be refused with the message meant for people.
"""

import contextlib
import copy
import gzip
import hashlib
import io
import json
import math
import os
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from audited import noticed
from commands import DATA, REPO
from conftest import Run, examples
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import compare
from checkpoints.reading import listed, read_checkpoint
from cli.command import Command, parse_command_line
from cli.flags import FLAGS, SUBCOMMANDS
from cli.recipes import load_yaml, recipes
from datamodules.files.finding import NAMES, DatasetError, _parse_idx, load, prepare
from datamodules.files.pictures import PictureError, read_picture
from errors import UserError
from launch.run import run

MANY, SOME, FEW = examples(1000), examples(150), examples(40)

WORDS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1e999",
        "nan",
        "inf",
        "null",
        "true",
        "[]",
        "{}",
        "auto",
        "last",
        "lenet",
        "..",
        "/",
        "\0",
        "é",
        "3,4",
    ]
)
VALUES = st.one_of(WORDS, st.text(max_size=12), st.integers().map(str), st.floats().map(str))
LONG = st.sampled_from(["--trainer.max_steps", "--model.net", "--data.val_size", "--trainer", "--model.", "--data.x.y"])
TOKENS = st.one_of(
    st.sampled_from([*FLAGS, *SUBCOMMANDS, "-h", "--help", "--"]),
    st.tuples(st.one_of(st.sampled_from(list(FLAGS)), LONG), VALUES).map("=".join),
    LONG,
    VALUES,
)
# What can be done to a file: bytes overwritten, cut out, or put in.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "truncate"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, new in edits:
        at = int(where * len(content))
        if kind == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "cut":
            content = content[:at] + content[at + len(new) * 50 :]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        else:
            content = content[:at]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("fuzz")
    with contextlib.chdir(path) if hasattr(contextlib, "chdir") else pytest.MonkeyPatch.context() as patch:
        if patch:
            patch.chdir(path)
        yield path


@MANY
@given(st.lists(TOKENS, max_size=6))
@example(["--config", "\0"])
def test_command_lines(folder: Path, tokens: list[str]) -> None:
    try:
        command = parse_command_line(tokens)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert command is None or isinstance(command, Command)


@MANY
@given(st.sampled_from(sorted(recipes().values())), EDITS)
def test_damaged_recipes(folder: Path, recipe: Path, edits: list) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(edited(recipe.read_bytes(), edits))
    try:
        content = load_yaml(path)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert isinstance(content, dict)


@MANY
@given(st.text(alphabet="abc: \n-[]{}&*!|>'\"#%@\t,?", max_size=60))
def test_any_text_as_yaml(folder: Path, text: str) -> None:
    path = folder / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with contextlib.suppress(UserError):
        assert isinstance(load_yaml(path), dict)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 300), st.floats(), st.text(max_size=8), WORDS)
NODES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=6), SCALARS, max_size=2))


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """The path to each entry of nested mappings."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            yield from places(value, (*path, key))


def recipe(name: str) -> dict:
    return yaml.safe_load(recipes()[name].read_text(encoding="utf-8"))


# A recipe, a place in it, and what becomes of it: another value, another name for it, or nothing.
MUTATIONS = st.sampled_from(["lenet", "lenet_classic"]).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.sampled_from(sorted(places(recipe(name)))),
        st.sampled_from(["replace", "rename", "delete"]),
        NODES,
        st.text(min_size=1, max_size=8),
    )
)


@FEW
@given(MUTATIONS)
@example(("lenet_classic", ("model", "net"), "replace", {}, ""))
@example(("lenet", ("model", "net"), "replace", {"class_path": "torch.nn.Module"}, ""))
@example(("lenet", ("model", "net"), "replace", {"class_path": "torch.nn.ReLU"}, ""))
@example(("lenet", ("model", "net"), "replace", {"class_path": "torch.nn.Linear"}, ""))
@example(("lenet", ("model", "net"), "replace", {"class_path": "torch.nn.Transformer"}, ""))
@example(("lenet", ("model", "net"), "replace", {"class_path": "os.getcwd"}, ""))
def test_mutated_settings(folder: Path, mutation: tuple) -> None:
    """Through the whole command line, up to where training would begin."""
    name, (*parents, key), kind, other, new_name = mutation
    content = recipe(name)
    at = content
    for parent in parents:
        at = at[parent]
    value = at.pop(key)
    if kind == "replace":
        at[key] = other
    elif kind == "rename":
        at[new_name] = value
    path = folder / "mutated.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # run sets its own filters
        try:
            command = parse_command_line(["--model", str(path), "--accelerator", "cpu", "--print_model"])
            assert command
            run(command)
        except UserError as error:
            assert str(error) and "\n" not in str(error)
        except SystemExit as end:
            assert end.code == 0


@pytest.fixture(scope="module")
def sound() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {split: load(DATA, split) for split in ("train", "test")}


@SOME
@given(st.sampled_from(NAMES), st.booleans(), EDITS)
def test_damaged_data_files(folder: Path, sound: dict, name: str, compressed: bool, edits: list) -> None:
    data_dir = folder / "data"
    shutil.rmtree(data_dir, ignore_errors=True)
    data_dir.mkdir()
    for other in NAMES:
        source = DATA / f"{other}.gz"
        if other != name:
            (data_dir / source.name).symlink_to(source)
        elif compressed:
            (data_dir / source.name).write_bytes(edited(source.read_bytes(), edits))
        else:
            (data_dir / other).write_bytes(edited(gzip.decompress(source.read_bytes()), edits))
    try:
        found = prepare(data_dir, data_set="sample", system_dir=folder / "none", mirrors=())
        loaded = {split: load(found, split) for split in ("train", "test")}
    except DatasetError as error:
        assert name in str(error)
    else:
        assert all(torch.equal(*pair) for split in sound for pair in zip(sound[split], loaded[split], strict=True))


@MANY
@given(st.binary(max_size=64) | st.binary(max_size=40).map(b"\0\0\x08\x03".__add__), st.sampled_from([(28, 28), ()]))
def test_any_bytes_as_idx(content: bytes, shape: tuple[int, ...]) -> None:
    with contextlib.suppress(ValueError):
        assert _parse_idx(content, shape).shape[1:] == shape


@MANY
@given(
    st.lists(st.integers(0, 10), max_size=24).map(bytes) | st.binary(max_size=24),
    st.sampled_from([(), (2, 3)]),
    st.integers(-1, 1),
)
def test_idx_files_are_read_if_the_header_counts_right(content: bytes, shape: tuple[int, ...], more: int) -> None:
    """Labels, and images of 2x3 pixels."""
    size = math.prod(shape)
    count = max(0, len(content) // size + more)
    header = struct.pack(f">4B{1 + len(shape)}I", 0, 0, 8, 1 + len(shape), count, *shape)
    right = 0 < len(content) == count * size and (shape or max(content) <= 9)
    try:
        assert bytes(_parse_idx(header + content, shape).flatten().tolist()) == content and right
    except ValueError:
        assert not right


@pytest.fixture(scope="module")
def saved(folder: Path) -> bytes:
    state = {"state_dict": {"weights": torch.arange(3000.0)}, "config": "model: {}", "epoch": 3}
    torch.save(state, folder / "sound.ckpt")
    return (folder / "sound.ckpt").read_bytes()


@SOME
@given(EDITS)
def test_damaged_checkpoints(folder: Path, saved: bytes, edits: list) -> None:
    path = folder / "damaged.ckpt"
    path.write_bytes(edited(saved, edits))
    try:
        content = read_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(content["state_dict"]["weights"], torch.arange(3000.0))


@SOME
@given(st.binary(max_size=200))
def test_any_bytes_as_a_checkpoint(folder: Path, content: bytes) -> None:
    path = folder / "any.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_checkpoint(path)


@SOME
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), EDITS)
def test_damaged_pictures(folder: Path, kind: str, edits: list) -> None:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, kind)
    path = folder / f"damaged.{kind.lower()}"
    path.write_bytes(edited(buffer.getvalue(), edits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(PictureError):
            assert min(read_picture(path).size) > 0


# ---- Files in JSON: the record of a run, and the list beside released weights.

HOSTILE = st.sampled_from(
    ["\x1b]0;title\x07", "a\nb\r\u2028c", "\u202e", "\ud800", "[red]x[/]", "<script>", "a | b", "../..", "/etc/passwd"]
)
JSON = st.one_of(HOSTILE, NODES, st.sampled_from([10**400, -1, 1e308, 2**63, [[[[[]]]]], "x" * 5000]))
WATCHED: list[list[str]] = []  # what happens is added to the last one, while there is one


@pytest.fixture(scope="module")
def audit(folder: Path) -> None:
    def see(event: str, args: tuple[Any, ...]) -> None:
        if WATCHED and (seen := noticed(event, args, folder / "mine")):
            WATCHED[-1].append(seen)

    sys.addaudithook(see)  # for good: a hook can't be taken away


@pytest.mark.parametrize("place", ["mine", "mine-not", "."])
@pytest.mark.usefixtures("audit")
def test_every_change_outside_of_the_allowed_folder_is_noticed(folder: Path, place: str) -> None:
    target, source = folder / place / "target", folder / "mine" / "source"
    target.parent.mkdir(exist_ok=True)
    source.parent.mkdir(exist_ok=True)
    link = source.with_name("link")
    new: list[Callable[[], Any]] = [
        lambda: source.rename(target),
        lambda: source.replace(target),
        lambda: shutil.move(source, target),
        lambda: shutil.copy(source, target),
        lambda: target.hardlink_to(source),
        lambda: target.symlink_to(source),
        target.touch,
        target.mkdir,
    ]
    old: list[Callable[[], Any]] = [
        lambda: link.hardlink_to(target),
        lambda: link.symlink_to(target),
        lambda: target.chmod(0o600),
        lambda: os.utime(target, (0, 0)),
        lambda: os.truncate(target, 0),
        target.unlink,
    ]
    for number, change in enumerate([*new, *old]):
        source.touch()
        if change in old:
            target.touch()
        seen: list[str] = []
        WATCHED.append(seen)
        try:
            change()
        finally:
            WATCHED.pop()
        assert bool(seen) == (place != "mine"), number
        for path in (target, source, link):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def mutated(content: Any, where: float, kind: str, value: Any, name: str) -> Any:
    """A copy in which one entry holds another value, has another name, or is missing; first its section is chosen."""
    content = copy.deepcopy(content)
    section = sorted(content)[int(where * len(content))]
    found = [(section,), *((section, *place) for place in sorted(places(content[section])))]
    *parents, key = found[int(where * len(content) % 1 * len(found))]
    at = content
    for parent in parents:
        at = at[parent]
    old = at.pop(key)
    if kind != "delete":
        at[key if kind == "replace" else name] = value if kind == "replace" else old
    return content


MUTATED = (st.floats(0, 1, exclude_max=True), st.sampled_from(["replace", "rename", "delete"]), JSON, HOSTILE)


@FEW
@given(*MUTATED)
@pytest.mark.usefixtures("audit")
def test_whatever_a_record_holds(folder: Path, trained: Run, where: float, kind: str, value: Any, name: str) -> None:
    """One line that names the file, or a table in which every text is shown as text; nothing is touched."""
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for seed, content in enumerate((record, mutated(record, where, kind, value, name))):
        path = folder / "runs" / str(seed) / "record.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    seen: list[str] = []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        WATCHED.append(seen)
        try:
            code = compare.main([str(folder / "runs")])
        finally:
            WATCHED.pop()
    assert not seen
    said = out.getvalue() + err.getvalue()
    assert all(char.isprintable() or char == "\n" for char in said)
    assert code == 0 or (code, err.getvalue().count("\n"), str(path) in said) == (2, 1, True)


@SOME
@given(*MUTATED)
@pytest.mark.usefixtures("audit")
def test_whatever_a_list_of_weights_holds(
    folder: Path, saved: bytes, where: float, kind: str, value: Any, name: str
) -> None:
    (folder / "listed").mkdir(exist_ok=True)
    path = folder / "listed" / "lenet.ckpt"
    path.write_bytes(saved)
    content = json.loads((REPO / "weights" / "weights.json").read_text(encoding="utf-8"))
    content["lenet.ckpt"]["sha256"] = hashlib.sha256(saved).hexdigest()
    path.with_name("weights.json").write_text(json.dumps(mutated(content, where, kind, value, name)), encoding="utf-8")
    seen: list[str] = []
    WATCHED.append(seen)
    try:
        accuracy = listed(path).get("test_accuracy") or 0
        assert isinstance(accuracy, float | int) and 0 <= accuracy <= 1
        assert torch.equal(read_checkpoint(path)["state_dict"]["weights"], torch.arange(3000.0))
    except UserError as error:
        assert "weights.json" in str(error) and "\n" not in str(error)
    finally:
        WATCHED.pop()
    assert not seen
