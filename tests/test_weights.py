"""The trained networks in weights/, and the command that packs them."""

import json
import re
import shutil

import pytest
import torch
from commands import DATA, REPO, run_forked
from test_full_dataset import full_set

from checkpoints.reading import LISTING, read_checkpoint
from datamodules import FashionMNISTDataModule
from datamodules.files.finding import load
from errors import UserError
from lit_modules import LitClassifier
from weights import pack
from weights.trained import load_trained

WEIGHTS = REPO / "weights"
LISTED = json.loads((WEIGHTS / LISTING).read_text(encoding="utf-8"))
IMAGES, LABELS = load(DATA, "test")


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    """The sample's LeNet, packed."""
    path = tmp_path_factory.mktemp("packed") / "small.ckpt"
    assert pack.main([str(trained.best), f"--output={path}", f"--data_dir={DATA}"]) == 0
    return path


def test_every_file_is_listed_and_intact():
    assert {path.name for path in WEIGHTS.glob("*.ckpt")} == set(LISTED)
    assert sum(entry["bytes"] for entry in LISTED.values()) < 16e6  # git keeps every version
    for name in LISTED:
        classifier, data, checkpoint = load_trained(WEIGHTS / name)  # which checks the hash
        assert checkpoint["recipe"] == LISTED[name]["recipe"]
        right = classifier.probabilities(data.preprocess(IMAGES[:100])).argmax(dim=1) == LABELS[:100]
        assert right.float().mean() > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_files_score_what_is_said(name):
    folder = full_set()
    if folder is None:
        pytest.skip("the full data set is not on this machine")
    classifier, data, _ = load_trained(WEIGHTS / name)
    images, labels = load(folder, "test")
    measured = pack.accuracy(classifier, data, images[:, None], labels)
    assert abs(measured - LISTED[name]["test_accuracy"]) <= 0.0005  # another processor rounds otherwise
    assert abs(measured - LISTED[name]["record"]["test_accuracy"]) <= pack.MIXED_TOLERANCE


def test_packed_file_is_small_and_does_what_the_checkpoint_does(trained, packed, tmp_path):
    assert packed.stat().st_size < 0.25 * trained.best.stat().st_size
    content = read_checkpoint(packed)
    assert {tensor.dtype for tensor in content["state_dict"].values() if tensor.dim() > 1} == {torch.float16}
    assert str(DATA).encode() not in packed.read_bytes()  # nor other paths of the machine
    assert not set(content) & {"optimizer_states", "callbacks", "loops", "lr_schedulers"}

    small, large = (LitClassifier.load_from_checkpoint(path) for path in (packed, trained.best))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert small.temperature == large.temperature
    pixels = FashionMNISTDataModule.load_from_checkpoint(packed).preprocess(IMAGES)
    assert torch.allclose(small.probabilities(pixels), large.probabilities(pixels), atol=5e-3)

    entry = json.loads((packed.parent / LISTING).read_text())[packed.name]
    answer = run_forked("test", f"--ckpt_path={packed}", f"--data_dir={DATA}", "--accelerator=cpu", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert f"accuracy {entry['test_accuracy']:.4f}" in answer.out
    answer = run_forked("fit", f"--ckpt_path={packed}", f"--data_dir={DATA}", folder=tmp_path)
    assert (answer.code, "weights alone" in answer.err) == (2, True)


def test_changed_file_is_refused(packed, tmp_path):
    folder = shutil.copytree(packed.parent, tmp_path / "copy")
    path = folder / packed.name
    content = torch.load(path, weights_only=True)
    content["temperature"] *= 2
    torch.save(content, path)  # a whole checkpoint, but another one
    for use in (read_checkpoint, LitClassifier.load_from_checkpoint):
        with pytest.raises(UserError, match=r"small\.ckpt is damaged or was changed: its SHA-256 is not") as caught:
            use(path)
        assert len(str(caught.value).splitlines()) == 1
    path.rename(folder / "mine.ckpt")  # which is not listed
    assert read_checkpoint(folder / "mine.ckpt")["temperature"] == content["temperature"]
    (folder / LISTING).write_text("[")
    with pytest.raises(UserError, match=r"weights\.json is damaged"):
        read_checkpoint(folder / "mine.ckpt")


def test_what_scores_otherwise_is_not_kept(trained, tmp_path, capsys):
    record = json.loads((trained.folder / "record.json").read_text())
    record["test"]["accuracy"] -= 0.006  # three of 500 images
    (tmp_path / "record.json").write_text(json.dumps(record))
    folder = tmp_path / "weights"
    arguments = [f"--output={folder / 'small.ckpt'}", f"--data_dir={DATA}"]
    assert pack.main([str(trained.best), *arguments, f"--record={tmp_path / 'record.json'}"]) == 1
    assert re.search(r"^weights\.pack: error: in half precision .* its record says 0\.\d+; nothing was written$",
                     capsys.readouterr().err)  # fmt: skip
    assert pack.main([str(trained.best), *arguments, f"--record={tmp_path / 'gone.json'}"]) == 2
    assert "gone.json is not the record of a run that was tested" in capsys.readouterr().err
    assert not list(folder.iterdir())
