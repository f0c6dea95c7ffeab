"""Nothing that a checkpoint or a record holds is executed or imported, wherever it is read."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import DATA, run_forked
from conftest import Run

import compare
import export
from datamodules import FashionMNISTDataModule
from errors import UserError
from lit_modules import LitClassifier

# Imported, it leaves a file beside itself.
MODULE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("executed").touch()

class Net(nn.Module):
    pass
"""
NAMED = "names the class"
# Ways to make the parser import `planted` in the place of the network's class, and what refuses them.
NETWORKS: dict[str, Any] = {
    "class path": {"class_path": "planted.Net"},
    "plain name": "planted.Net",
    "YAML": '{"class_path": "planted\\x2eNet"}',
    "file of settings": "settings",
    "argument of a trusted class": {"class_path": "torch.nn.Sequential", "init_args": {"a": ["planted.Net"]}},
    "class that a trusted module imports": {"class_path": "torch.hub.Request"},
    "no text": {"class_path": 5},
}


class Payload:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a module in it that shows when it was imported."""
    (tmp_path / "planted.py").write_text(MODULE)
    (tmp_path / "settings").write_text("class_path: planted.Net\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return tmp_path


def spoilt(trained: Run, **changes: Any) -> dict[str, Any]:
    """The checkpoint with settings of its own, both in its configuration and in its hyper-parameters."""
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    for name, value in changes.items():
        section = {"net": "model", "optimizer": "model", "batch_size": "data", "callbacks": "trainer"}[name]
        config[section][name] = value
        key = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}.get(section)
        if key:
            content[key][name] = value
    return content | {"config": yaml.safe_dump(config)}


def check(folder: Path, error: str, expected: str) -> None:
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not (folder / "executed").exists()


def exported(path: str) -> None:
    assert export.main([f"--ckpt_path={path}", "--format=torch_export"]) == 2


@pytest.mark.parametrize("kind", NETWORKS)
def test_classes_from_elsewhere_are_not_imported(
    kind: str, trained: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(spoilt(trained, net=NETWORKS[kind]), "spoilt.ckpt")
    exported("spoilt.ckpt")
    check(folder, capsys.readouterr().err, NAMED)
    with pytest.raises(UserError) as caught:
        LitClassifier.load_from_checkpoint("spoilt.ckpt")
    check(folder, str(caught.value), NAMED)


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_subcommands_import_and_unpickle_nothing(subcommand: str, trained: Run, folder: Path) -> None:
    for content, expected in (
        (spoilt(trained, net="planted.Net"), NAMED),
        ({"state_dict": {}, "config": Payload()}, "holds objects that a checkpoint of this project never holds"),
    ):
        torch.save(content, "spoilt.ckpt")
        answer = run_forked(subcommand, "--ckpt_path=spoilt.ckpt", f"--data_dir={DATA}", folder=folder)
        assert answer.code == 2
        check(folder, answer.err, expected)


def test_training_goes_on_without_a_callback_from_elsewhere(trained: Run, folder: Path) -> None:
    torch.save(spoilt(trained, callbacks=[{"class_path": "planted.Net"}]), "spoilt.ckpt")
    answer = run_forked("fit", "--ckpt_path=spoilt.ckpt", f"--data_dir={DATA}", folder=folder)
    assert answer.code == 2
    check(folder, answer.err, NAMED)


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_last_imports_and_unpickles_nothing(subcommand: str, trained: Run, folder: Path) -> None:
    path = folder / "logs" / "lenet" / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    for content, expected in (
        (spoilt(trained, net={"class_path": "planted.Net"}), "the checkpoint was made with"),
        ({"state_dict": {}, "config": Payload()}, "holds objects"),
    ):
        torch.save(content, path)
        answer = run_forked(subcommand, "--model=lenet", "--ckpt_path=last", f"--data_dir={DATA}", folder=folder)
        assert answer.code == 2
        check(folder, answer.err, expected)


@pytest.mark.parametrize("load", [LitClassifier.load_from_checkpoint, FashionMNISTDataModule.load_from_checkpoint])
@pytest.mark.parametrize("arguments", [{}, {"weights_only": False}, {"trust_checkpoint": True}])
def test_python_unpickles_nothing(load: Callable, arguments: dict, folder: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Payload()}, "spoilt.ckpt")
    with pytest.raises(UserError) as caught:
        load("spoilt.ckpt", **arguments)
    check(folder, str(caught.value), "holds objects")


@pytest.mark.parametrize("load", [LitClassifier.load_from_checkpoint, FashionMNISTDataModule.load_from_checkpoint])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("https://localhost/best.ckpt", "is an address; download the checkpoint first"),
        ("s3://bucket/best.ckpt", "is an address"),
        (sys.stdin, "give its path"),
        ("gone.ckpt", "does not exist"),
    ],
)
def test_python_takes_files_alone(load: Callable, path: Any, expected: str, folder: Path) -> None:
    with pytest.raises(UserError, match=expected):
        load(path)


def test_data_module_imports_nothing(trained: Run, folder: Path) -> None:
    torch.save(spoilt(trained, batch_size={"class_path": "planted.Net"}), "spoilt.ckpt")
    with pytest.raises(UserError) as caught:
        FashionMNISTDataModule.load_from_checkpoint("spoilt.ckpt")
    check(folder, str(caught.value), NAMED)


@pytest.mark.parametrize("key", ["_instantiator", "_class_path"])
def test_lightnings_own_entries_import_nothing(key: str, trained: Run, folder: Path) -> None:
    content = torch.load(trained.best, weights_only=True)
    content["hyper_parameters"][key] = "planted.Net"
    torch.save(content, "spoilt.ckpt")
    with pytest.raises(UserError) as caught:
        LitClassifier.load_from_checkpoint("spoilt.ckpt")
    check(folder, str(caught.value), NAMED)


def test_settings_within_themselves_are_refused(trained: Run, folder: Path) -> None:
    content = torch.load(trained.best, weights_only=True)
    endless: dict = {}
    content["hyper_parameters"]["net"] = endless["net"] = endless
    torch.save(content, "spoilt.ckpt")
    with pytest.raises(UserError, match="within themselves"):
        LitClassifier.load_from_checkpoint("spoilt.ckpt")
    torch.save(content | {"config": "model: &a {net: *a}\ndata: {}\n"}, "spoilt.ckpt")
    exported("spoilt.ckpt")


def test_a_trusted_checkpoint_may_name_any_class(trained: Run, folder: Path) -> None:
    """And the trap works: what the tests above look for does appear."""
    torch.save(spoilt(trained, net={"class_path": "planted.Net"}), "spoilt.ckpt")
    with pytest.raises(RuntimeError, match="Unexpected key"):  # the weights are those of LeNet
        LitClassifier.load_from_checkpoint("spoilt.ckpt", trust_checkpoint=True)
    assert (folder / "executed").exists()


def test_records_are_read_as_plain_values(trained: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((trained.folder / "record.json").read_text())
    record["config"]["model"]["net"] = {"class_path": "planted.Net"}
    (folder / "record.json").write_text(json.dumps(record))
    assert compare.main(["record.json"]) == 0
    assert "lenet" in capsys.readouterr().out
    assert not (folder / "executed").exists()
