"""The trained networks in weights/, packing and exporting."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from commands import DATA, ENVIRONMENT, REPO, run_forked, whole_set

import export
from checkpoints.plain import read_settings
from checkpoints.reading import LISTING, read_checkpoint
from cli.recipes import load_yaml, recipes
from datamodules import CLASS_NAMES, FashionMNISTDataModule
from datamodules.files.finding import load
from errors import RunError, UserError
from export import SUFFIXES
from lit_modules import LitClassifier
from weights import exporting, pack
from weights.trained import load_trained

# ---- The trained networks in weights/, and the command that packs them.

WEIGHTS = REPO / "weights"
LISTED = json.loads((WEIGHTS / LISTING).read_text(encoding="utf-8"))
SLOWEST = ("alexnet_half.ckpt", "googlenet.ckpt", "nin.ckpt")
IMAGES, LABELS = load(DATA, "test")


@pytest.fixture(scope="module")
def halved(trained, tmp_path_factory):
    """The sample's LeNet; its record has the score in half precision, as it is chance which images change sides."""
    halved = trained._replace(folder=shutil.copytree(trained.folder, tmp_path_factory.mktemp("halved") / "version_0"))
    classifier, data, _ = load_trained(halved.best)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half())
    record = json.loads((halved.folder / "record.json").read_text())
    record["test"]["accuracy"] = pack.share(pack.correct(classifier, data, IMAGES[:, None], LABELS))
    (halved.folder / "record.json").write_text(json.dumps(record))
    return halved


@pytest.fixture(scope="module")
def packed(halved, tmp_path_factory):
    """The sample's LeNet, packed."""
    path = tmp_path_factory.mktemp("packed") / "small.ckpt"
    assert pack.main([str(halved.best), f"--output={path}", f"--data_dir={DATA}"]) == 0
    return path


def test_every_file_is_listed_and_intact():
    assert {path.name for path in WEIGHTS.glob("*.ckpt")} == set(LISTED)
    assert sum(entry["bytes"] for entry in LISTED.values()) < 29e6  # git keeps every version
    for name in LISTED:
        classifier, data, checkpoint = load_trained(WEIGHTS / name)  # which checks the hash
        assert checkpoint["recipe"] == LISTED[name]["recipe"]
        if (recipe := recipes().get(checkpoint["recipe"])) is None:
            assert checkpoint["recipe"] == "photographs"  # see docs/weights.md
        else:
            net, stored = (
                config["model"]["net"] for config in (load_yaml(recipe), read_settings(checkpoint.get("config"), name))
            )
            assert stored["class_path"] == net["class_path"]
            assert net.get("init_args", {}).items() <= stored["init_args"].items()
        assert classifier.out_of_distribution is not None
        right = classifier.probabilities(data.preprocess(IMAGES[:100])).argmax(dim=1) == LABELS[:100]
        assert right.float().mean() > 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in SLOWEST else ()) for name in LISTED],
)
def test_files_score_what_is_said(name):
    folder = whole_set()
    if folder is None:
        pytest.skip("the full data set is not on this machine")
    classifier, data, _ = load_trained(WEIGHTS / name)
    images, labels = load(folder, "test")
    measured = pack.share(pack.correct(classifier, data, images[:, None], labels))
    assert measured is not None
    assert abs(measured - LISTED[name]["test_accuracy"]) <= 0.0005  # another processor rounds otherwise
    recorded = LISTED[name]["record"]["test_accuracy"]
    assert recorded is None or abs(measured - recorded) <= pack.MIXED_TOLERANCE


def test_packed_file_is_small_and_does_what_the_checkpoint_does(halved, packed, tmp_path):
    assert packed.stat().st_size < 0.25 * halved.best.stat().st_size
    content = read_checkpoint(packed)
    assert {tensor.dtype for tensor in content["state_dict"].values() if tensor.dim() > 1} == {torch.float16}
    assert str(DATA).encode() not in packed.read_bytes()  # nor other paths of the machine
    assert not set(content) & {"optimizer_states", "callbacks", "loops", "lr_schedulers"}

    small, large = (LitClassifier.load_from_checkpoint(path) for path in (packed, halved.best))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert small.temperature == large.temperature
    pixels = FashionMNISTDataModule.load_from_checkpoint(packed).preprocess(IMAGES)
    with torch.no_grad():
        for parameter in large.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half())
    torch.testing.assert_close(small.probabilities(pixels), large.probabilities(pixels), rtol=1e-5, atol=1e-6)

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


def test_a_small_file_of_an_older_version_gets_the_score_of_strange_images(packed, tmp_path, capsys):
    folder = shutil.copytree(packed.parent, tmp_path / "copy")
    path, listing = folder / packed.name, folder / LISTING
    content = torch.load(path, weights_only=True)
    del content["out_of_distribution"]
    torch.save(content, path)
    entries = json.loads(listing.read_text())
    entries[path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    listing.write_text(json.dumps(entries))
    assert pack.main([str(path), f"--data_dir={DATA}"]) == 0
    again = read_checkpoint(path)  # which checks the new hash
    model, data, _ = load_trained(path)
    data.data_dir = DATA
    expected = pack._fit_out_of_distribution(model, data)
    assert expected is not None
    assert all(torch.equal(again["state_dict"][name], value) for name, value in content["state_dict"].items())
    for name, value in again["out_of_distribution"].items():
        torch.testing.assert_close(value, expected[name])
    entry = json.loads(listing.read_text())[path.name]
    assert entry["test_accuracy"] == entries[path.name]["test_accuracy"]
    assert entry["record"] == entries[path.name]["record"]
    del entries[path.name]["record"], entries[path.name]["sha256"]
    listing.write_text(json.dumps(entries))
    assert pack.main([str(path), f"--data_dir={DATA}"]) == 2
    assert "holds no record of that file; give --record FILE" in capsys.readouterr().err


def test_what_scores_otherwise_is_not_kept(halved, tmp_path, capsys):
    record = json.loads((halved.folder / "record.json").read_text())
    record["test"]["accuracy"] -= 0.006  # three of 500 images
    (tmp_path / "record.json").write_text(json.dumps(record))
    folder = tmp_path / "weights"
    arguments = [f"--output={folder / 'small.ckpt'}", f"--data_dir={DATA}"]
    assert pack.main([str(halved.best), *arguments, f"--record={tmp_path / 'record.json'}"]) == 1
    assert re.search(r"^weights\.pack: error: in half precision .* its record says 0\.\d+; nothing was written$",
                     capsys.readouterr().err)  # fmt: skip
    assert pack.main([str(halved.best), *arguments, f"--record={tmp_path / 'gone.json'}"]) == 2
    assert "gone.json is not the record of a run (it can't be read as JSON); give" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_run_that_was_stopped_can_be_packed_and_says_so(halved, tmp_path, capsys):
    record = json.loads((halved.folder / "record.json").read_text())
    del record["test"]
    (tmp_path / "record.json").write_text(json.dumps(record))
    path = tmp_path / "small.ckpt"
    arguments = [f"--output={path}", f"--data_dir={DATA}", f"--record={tmp_path / 'record.json'}"]
    assert pack.main([str(halved.best), *arguments]) == 0
    assert "the run was stopped before its test" in capsys.readouterr().out
    entry = json.loads((tmp_path / LISTING).read_text())[path.name]
    assert set(entry["class_accuracy"]) == set(CLASS_NAMES)
    assert (entry["record"]["test_accuracy"], entry["test_accuracy"] > 0.5) == (None, True)


# ---- Exported files: what is in them, that they compute the same, and what happens if they don't.

FORMATS = ["onnx", "torch_export"]
TEST_IMAGES = load(DATA, "test")[0]
# As the README shows it.
THREE_LINES = """
classifier = LitClassifier.load_from_checkpoint("logs/lenet/version_0/checkpoints/best.ckpt")
data = FashionMNISTDataModule.load_from_checkpoint("logs/lenet/version_0/checkpoints/best.ckpt")
probabilities = classifier.probabilities(data.preprocess(images))
"""


@pytest.fixture(scope="module")
def unusual(tmp_path_factory):
    """A checkpoint whose images are shrunk, normalised and made three channels."""
    folder = tmp_path_factory.mktemp("unusual")
    flags = "fit --model lenet --image_size 20 --data.mean 0.28 --data.std 0.35 --data.channels 3 --val_size 300"
    more = "--model.net.in_channels 3 --max_epochs 1 --batch_size 64 --accelerator cpu --devices 1"
    answer = run_forked(*flags.split(), *more.split(), f"--data_dir={DATA}", folder=folder)
    assert answer.code == 0, answer.err
    return folder / "logs" / "lenet" / "version_0" / "checkpoints" / "best.ckpt"


def read(path):
    """The file's function, numbers of a batch in and out, and its metadata; by means of its own format alone."""
    if path.suffix == ".pt2":
        files = {"metadata.json": ""}
        module = torch.export.load(path, extra_files=files).module()
        return (lambda images: module(images)[0]), json.loads(files["metadata.json"])
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    (given,), (made, score) = session.get_inputs(), session.get_outputs()
    assert (score.name, score.type, len(score.shape)) == ("out_of_distribution", "tensor(float)", 1)
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [28, 28])
    assert (made.name, made.type, made.shape[1:]) == ("probabilities", "tensor(float)", [10])

    def predict(images):
        return torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])

    return predict, session.get_modelmeta().custom_metadata_map


def reference(path, images):
    """Probabilities by the plain route: preprocess as for validation, network, softmax at the stored temperature."""
    checkpoint = torch.load(path, weights_only=True)
    classifier = LitClassifier.load_from_checkpoint(path).eval()
    data = FashionMNISTDataModule.load_from_checkpoint(path)
    pixels, _ = data.on_after_batch_transfer((images[:, None], torch.zeros(len(images))), 0)
    with torch.no_grad():
        return (classifier(pixels) / checkpoint["temperature"]).softmax(dim=1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["usual", "unusual"])
def test_file_computes_what_the_checkpoint_does(trained, unusual, tmp_path, capsys, format, kind):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = trained.best if kind == "usual" else unusual
    target = tmp_path / "new" / f"net{export.SUFFIXES[format]}"
    assert export.main([f"--ckpt_path={path}", f"--format={format}", f"--output={target}"]) == 0
    out = capsys.readouterr().out
    assert "Checked on 500 test images: same class on all" in out
    assert f"Wrote {target} ({target.stat().st_size / 1e6:.1f} MB)" in out
    assert [file.name for file in target.parent.iterdir()] == [target.name]

    predict, metadata = read(target)
    assert json.loads(metadata["class_names"]) == list(CLASS_NAMES)
    assert metadata["recipe"] == "lenet"
    expected = reference(path, TEST_IMAGES)
    for batch in (slice(0, 1), slice(1, 8), slice(8, 500)):
        given = predict(TEST_IMAGES[batch])
        assert torch.equal(given.argmax(dim=1), expected[batch].argmax(dim=1))
        assert torch.allclose(given, expected[batch], atol=1e-4)


def test_a_network_too_large_for_one_onnx_file_is_one_line(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    # PyTorch's own: a real one would take gigabytes.
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    assert export.main([f"--ckpt_path={trained.best}", "--format=onnx", f"--output={tmp_path / 'a.onnx'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "LeNet can't be exported as onnx: it is too large for one file; --format torch_export has no" in line
    assert not list(tmp_path.iterdir())


def test_file_lies_beside_the_checkpoint_and_holds_no_images(trained, tmp_path):
    path = tmp_path / "best.ckpt"
    path.write_bytes(trained.best.read_bytes())
    assert export.main([f"--ckpt_path={path}", "--format=torch_export"]) == 0
    assert (tmp_path / "best.pt2").stat().st_size < path.stat().st_size  # which holds the optimiser's state as well


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda output: output.roll(1, dims=1), r"another class on 4\d\d of 500"),
        (lambda output: output + 2e-4, "another class on 0 of 500 test images, probabilities by up to 2.0e-04"),
        (lambda output: output * torch.nan, "probabilities by up to nan"),
    ],
)
def test_check_sees_differences(spoil, message):
    def right(images):
        return images.flatten(1)[:, 300:310].float().softmax(dim=1)

    assert "same class on all, probabilities within 0.0e+00" in exporting._check(right, right, TEST_IMAGES)[0]
    with pytest.raises(RunError, match=message):
        exporting._check(right, lambda images: spoil(right(images)), TEST_IMAGES)


def damaged(path, folder):
    target = folder / "damaged.ckpt"
    target.write_bytes(path.read_bytes()[:5000])
    return target


def changed(path, folder, **changes):
    """A copy of a checkpoint with other entries."""
    target = folder / "changed.ckpt"
    torch.save({**torch.load(path, weights_only=True), **changes}, target)
    return target


def test_mistakes_answer_with_one_line(trained, tmp_path, capsys):
    stored = torch.load(trained.best, weights_only=True)
    foreign = stored["config"].replace("models.lenet.LeNet", "subprocess.Popen")
    other = stored["config"].replace("padding: 2", "padding: 0")
    (tmp_path / "folder.pt2").mkdir()
    cases = [
        ([], "the following arguments are required: --ckpt_path, --format"),
        (["--ckpt_path=x.ckpt", "--format=onx"], "argument --format: invalid choice: 'onx'"),
        (["--ckpt_path=x.ckpt", "--format=onnx", "--outptu=y"], "unrecognized arguments: --outptu=y"),
        (
            ["--ckpt_path=x.ckpt", "--format=onnx", "--output=y.pt2"],
            "--output y.pt2: a file of the format onnx ends",
        ),
        (["--ckpt_path=gone.ckpt", "--format=torch_export"], "the checkpoint gone.ckpt does not exist"),
        (["--ckpt_path=https://a/b.ckpt", "--format=torch_export"], "https:/a/b.ckpt is an address"),
        (
            [f"--ckpt_path={damaged(trained.best, tmp_path)}", "--format=torch_export"],
            "damaged.ckpt is damaged or is not a checkpoint",
        ),
    ]
    for arguments, message in cases:
        assert export.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("export.py: error: ")
        assert len(error.splitlines()) == 1
    for config, message in ((foreign, "names the class subprocess.Popen"), (other, "does not fit")):
        path = changed(trained.best, tmp_path, config=config)
        assert export.main([f"--ckpt_path={path}", "--format=torch_export"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    output = tmp_path / "folder.pt2"
    assert export.main([f"--ckpt_path={trained.best}", "--format=torch_export", f"--output={output}"]) == 1
    assert "folder.pt2 can't be written: Is a directory" in capsys.readouterr().err
    # Where no file can be made, even by root.
    assert export.main([f"--ckpt_path={trained.best}", "--format=torch_export", "--output=/proc/self/a.pt2"]) == 1
    assert "/proc/self/a.pt2 can't be written: No such file or directory" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_a_full_disk_is_one_line(format, trained, tmp_path):
    # A limit on the size of files makes a write fail half-way, just as a full disk does.
    code = "import resource, sys, export; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000,) * 2); "
    arguments = [f"--ckpt_path={trained.best}", f"--format={format}", f"--output={tmp_path / 'a'}{SUFFIXES[format]}"]
    command = [sys.executable, "-c", f"{code}sys.exit(export.main(sys.argv[1:]))", *arguments]
    done = subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.endswith("can't be written: File too large")
    assert not list(tmp_path.iterdir())


def test_a_read_only_disk_is_one_line(trained, tmp_path):
    shell = f"mount -t tmpfs -o ro tmpfs {tmp_path} && {sys.executable} export.py --format torch_export"
    command = ["unshare", "-rm", "sh", "-c", f"{shell} --ckpt_path {trained.best} --output {tmp_path}/a.pt2"]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs Linux's user namespaces, to mount a disk")
    done = subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.endswith("a.pt2 can't be written: Read-only file system")


@pytest.mark.parametrize(
    ("script", "arguments", "package"),
    [
        ("export", ["--format=onnx"], "onnxscript"),
        ("train", ["predict", "--accelerator=cpu", "--images=x.png", "--gradcam"], "captum"),
    ],
)
def test_missing_package_is_named(trained, tmp_path, script, arguments, package):
    arguments = [*arguments, f"--ckpt_path={trained.best}"]
    code = f"import sys; sys.modules[{package!r}] = None; import {script}; sys.exit({script}.main({arguments!r}))"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert f"needs the package {package}: pip install -r requirements-extras.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_does_not_import_torch():
    code = "import sys, export\ntry: export.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True, timeout=30)
    assert b"--ckpt_path" in done.stdout


def test_three_lines_of_python_suffice(trained, monkeypatch):
    monkeypatch.chdir(trained.start)
    names: dict[str, Any] = {
        "LitClassifier": LitClassifier,
        "FashionMNISTDataModule": FashionMNISTDataModule,
        "images": TEST_IMAGES,
    }
    exec(THREE_LINES, names)  # warnings are errors here
    assert names["probabilities"].shape == (500, 10)
    assert torch.allclose(names["probabilities"], reference(trained.best, TEST_IMAGES), atol=1e-6)


def test_only_bytes_are_preprocessed(trained):
    data = FashionMNISTDataModule.load_from_checkpoint(trained.best)
    assert torch.equal(data.preprocess(TEST_IMAGES), data.preprocess(TEST_IMAGES[:, None]))
    with pytest.raises(ValueError, match=r"torch\.float32; torch\.uint8, from 0 to 255"):
        data.preprocess(TEST_IMAGES.float())
