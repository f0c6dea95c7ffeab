"""VGG from ImageNet weights, and convolutions that are frozen first; without a network, on weights made here."""

import hashlib
import http.server
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from commands import DATA, run_forked
from stoppable import checkpoint, differences, train, write
from test_resume import COMPUTED
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights

from errors import UserError
from models import VGG, LeNet, NiN
from weights.imagenet import _first_convolution, _weights_for, start_from_imagenet

MEAN, STD = 0.449, 0.226
NOWHERE = "http://127.0.0.1:9/"  # where nobody listens


def weights(name):
    return get_model_weights(name)["IMAGENET1K_V1"]


def write_weights(folder, name):
    """A file like torchvision's, named by its content; its linear layers share a few numbers, so that it is small."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in get_model(name).state_dict().items()}
    state = {}
    for key, shape in shapes.items():
        if key.startswith("classifier") and len(shape) == 2:
            state[key] = (torch.randn(sum(shape)) / 100).as_strided(shape, (1, 1))
        elif "num_batches" not in key:  # which batch normalisation lacked when torchvision's files were made
            state[key] = torch.rand(shape) + 0.5 if "running_var" in key else torch.randn(shape)
            if len(shape) == 4:
                state[key] *= (2 / (9 * shape[1])) ** 0.5
    path = folder / "weights.pth"
    torch.save(state, path)
    return path.rename(folder / f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")


def use(home, urls):
    """Have torch.hub keep its files in `home`, and torchvision look for weights at these addresses."""
    os.environ["TORCH_HOME"] = str(home)
    for name, url in urls.items():
        weights(name).value.url = url


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A TORCH_HOME with the weights of vgg11 and vgg11_bn."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    for name in ("vgg11", "vgg11_bn"):
        write_weights(folder / "hub" / "checkpoints", name)
    yield folder
    shutil.rmtree(folder)


def urls_of(home):
    files = (home / "hub" / "checkpoints").glob("*.pth")
    return {path.name.rpartition("-")[0]: NOWHERE + path.name for path in files}


@pytest.fixture
def cache(home, monkeypatch):
    """The same home, in this process; returns the weights by name."""
    monkeypatch.setenv("TORCH_HOME", str(home))
    for name, url in urls_of(home).items():
        monkeypatch.setattr(weights(name).value, "url", url)
    files = (home / "hub" / "checkpoints").glob("*.pth")
    return {path.name.rpartition("-")[0]: torch.load(path, weights_only=True) for path in files}


def vgg(**arguments):
    """Without drawing weights, which takes longer than all the rest."""
    with torch.device("meta"):
        net = VGG(11, **arguments)
    net.to_empty(device="cpu")
    for tensor in net.state_dict().values():
        tensor.zero_()
    return net.eval()


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_are_those_of_the_same_network(depth, batch_norm):
    with torch.device("meta"):
        net = VGG(depth, batch_norm=batch_norm, image_size=32)
    assert str(_weights_for(net)) == f"VGG{depth}{'_BN' * batch_norm}_Weights.IMAGENET1K_V1"


@pytest.mark.parametrize(
    ("batch_norm", "channels", "mean", "std"), [(False, 1, MEAN, STD), (True, 1, 0.0, 1.0), (False, 3, 0.3, 0.5)]
)
def test_features_of_a_grey_image_are_torchvisions(cache, batch_norm, channels, mean, std):
    """At 224, where what the first convolution sees around the image reaches all but the middle 3x3 of the features."""
    name = "vgg11_bn" if batch_norm else "vgg11"
    net = vgg(batch_norm=batch_norm, in_channels=channels)
    line = start_from_imagenet(net, mean, std)
    with torch.device("meta"):
        theirs = get_model(name).features.eval()
    features = {key.removeprefix("features."): t for key, t in cache[name].items() if key.startswith("features.")}
    theirs.load_state_dict(features, strict=False, assign=True)
    grey = torch.rand(1, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        found = net.features(((grey - mean) / std).expand(-1, channels, -1, -1))
        expected = theirs((grey.expand(-1, 3, -1, -1) - imagenet[0]) / imagenet[1])
    assert expected[..., 2:5, 2:5].std() > 0.01
    torch.testing.assert_close(found[..., 2:5, 2:5], expected[..., 2:5, 2:5], rtol=1e-4, atol=1e-4)
    for key in ("classifier.0", "classifier.3"):
        for kind in ("weight", "bias"):
            assert torch.equal(net.state_dict()[f"{key}.{kind}"], cache[name][f"{key}.{kind}"])
    assert not net.classifier[6].weight.any()
    assert line == f"Starting from {weights(name)}: convolutions and hidden layers; the last layer is new"


def test_sum_over_rgb_is_exact_where_the_channels_are_normalised_alike(cache):
    weight, bias = (cache["vgg11"][f"features.0.{kind}"].double() for kind in ("weight", "bias"))
    fitted = _first_convolution(weight, bias, 1, shift=torch.zeros(3), scale=torch.ones(3))
    grey = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv2d(grey, *fitted, padding=1), F.conv2d(grey.expand(-1, 3, -1, -1), weight, bias, padding=1)
    )


def test_another_image_size_gets_a_new_classifier(cache):
    net = vgg(image_size=64)
    line = start_from_imagenet(net, MEAN, STD)
    assert torch.equal(net.features[3].weight, cache["vgg11"]["features.3.weight"])
    assert not any(parameter.any() for parameter in net.classifier.parameters())
    assert line.endswith(": convolutions; the classifier is new, since ImageNet's takes images of 224x224")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments", "says"),
    [
        (LeNet, {}, "ImageNet weights for VGG-11, 13, 16 and 19, not for LeNet; use --model pretrained/vgg16"),
        (NiN, {}, "not for NiN"),
        (VGG, {"width_divisor": 8}, "features.0.weight is (8, 1, 3, 3) in this network, (64, 3, 3, 3) in ImageNet's"),
        (VGG, {"in_channels": 2}, "features.0.weight is (64, 2, 3, 3)"),
    ],
)
def test_wrong_network(network, arguments, says):
    with torch.device("meta"):
        net = network(**arguments)
    with pytest.raises(UserError, match="--pretrained") as error:
        start_from_imagenet(net, MEAN, STD)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cached_file_of_other_content_is_named_and_not_used(cache, home, tmp_path, monkeypatch):
    name = Path(weights("vgg11").url).name
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    content = (home / "hub" / "checkpoints" / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="delete it, and it is fetched again") as error:
        start_from_imagenet(vgg(image_size=32), MEAN, STD)
    assert str(error.value).startswith(f"{folder / name} is damaged or another file: its SHA-256 begins with ")
    assert f"not {name[-12:-4]}" in str(error.value)


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and counts."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(home):
    """The address of the weights."""
    Files.asked.clear()
    handler = partial(Files, directory=str(home / "hub" / "checkpoints"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def test_one_fetches_and_the_others_wait(cache, server, tmp_path, monkeypatch, capsys):
    name = Path(weights("vgg11").url).name
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights("vgg11").value, "url", server + name)
    nets = [vgg(image_size=32) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda net: start_from_imagenet(net, MEAN, STD), nets))
    assert Files.asked == [f"/{name}"]
    assert all(torch.equal(net.features[3].weight, cache["vgg11"]["features.3.weight"]) for net in nets)


@pytest.mark.parametrize(
    ("name", "says"),
    [("vgg11-00000000.pth", "404"), ("vgg11-11111111.pth", "invalid hash value"), (None, "Connection refused")],
)
def test_what_cannot_be_fetched(home, server, name, says, tmp_path, monkeypatch, capsys):
    if name == "vgg11-11111111.pth":
        (home / "hub" / "checkpoints" / name).write_bytes(b"something else")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights("vgg11").value, "url", server + name if name else f"{NOWHERE}vgg11-22222222.pth")
    with pytest.raises(UserError, match=says) as error:
        start_from_imagenet(vgg(image_size=32), MEAN, STD)
    (home / "hub" / "checkpoints" / "vgg11-11111111.pth").unlink(missing_ok=True)
    folder = tmp_path / "hub" / "checkpoints"
    assert str(error.value).startswith(f"--pretrained needs {folder}/vgg11-")
    assert "\n" not in str(error.value)
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_recipe_trains_and_its_checkpoint_needs_no_weights(home, cache, tmp_path):
    recipe = ["--model", "pretrained/vgg16", "--model.net.depth=11", "--image_size=32", "--data_dir", str(DATA)]
    fast = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--max_epochs=1", "--val_size=200"]
    here = partial(use, home, urls_of(home))
    nowhere = partial(use, tmp_path, {"vgg11": f"{NOWHERE}vgg11-22222222.pth"})
    answer = run_forked("fit", *recipe, *fast, folder=tmp_path, prepare=here)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("Starting from VGG11_Weights.IMAGENET1K_V1: convolutions; the classifier is new")
    path = tmp_path / "logs" / "pretrained" / "vgg16" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["net.features.3.weight"], cache["vgg11"]["features.3.weight"])  # frozen

    answer = run_forked("test", "--ckpt_path", str(path), folder=tmp_path, prepare=nowhere)
    assert (answer.code, answer.err) == (0, "")
    answer = run_forked("fit", "--ckpt_path", str(path), *fast[:2], folder=tmp_path, prepare=nowhere)
    assert (answer.code, answer.err) == (0, "")
    assert "Starting" not in answer.out
    record = yaml.safe_load((path.parents[1] / "record.json").read_text())
    assert record["config"]["pretrained"] is True
    answer = run_forked("fit", *recipe, *fast, folder=tmp_path, prepare=nowhere)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "Connection refused; try again with a network" in answer.err
    assert [run.name for run in (tmp_path / "logs" / "pretrained" / "vgg16").iterdir()] == ["version_0"]
    shutil.rmtree(tmp_path / "logs")


# --- freezing --------------------------------------------------------------------------------------------------------


def narrow(folder, *, epochs=1, lr_factor=0.1, net=None, optimizer=None):
    """An experiment of three epochs of five batches with a narrow VGG that is frozen in the first."""
    write(folder, image_size=32)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    arguments = {"depth": 11, "width_divisor": 16, "batch_norm": True}
    recipe["model"]["net"] = {"class_path": "models.vgg.VGG", "init_args": net or arguments}
    recipe["model"]["optimizer"] = optimizer or recipe["model"]["optimizer"]
    settings = {"epochs": epochs, "lr_factor": lr_factor}
    callback = {"class_path": "callbacks.fine_tuning.FreezeFeatures", "init_args": settings}
    recipe["trainer"]["callbacks"].insert(0, callback)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def changed(first, second):
    """Which parts of the network differ."""
    names = differences(first["state_dict"], second["state_dict"])
    return {name.split(".")[2] for name in names if name.startswith(".net.")}


def test_freezing_unfreezing_and_continuing_in_both_phases(tmp_path):
    whole, parts = narrow(tmp_path / "whole"), narrow(tmp_path / "parts")
    assert train(whole).code == 0
    saved: list[dict] = []
    more: list[str] = []
    for point in (["train", 0, 0, 0], ["train", 0, 4, 0], ["train", 1, 0, 0], ["train", 1, 3, 0]):
        answer = train(parts, *more, at=point)
        assert answer.code == 143, answer.err
        saved.append(checkpoint(parts))
        more = ["--ckpt_path", "checkpoints/last.ckpt"]
    answer = train(parts, *more)
    assert answer.code == 0, answer.err
    assert changed(saved[0], saved[1]) == {"classifier"}  # batch normalisation's statistics included
    assert changed(saved[1], saved[2]) == {"features", "classifier"}
    for state in saved:  # the schedule moves both
        rates = {group["name"]: group["lr"] for group in state["optimizer_states"][0]["param_groups"]}
        assert rates["features"] == pytest.approx(0.1 * rates["classifier"])
    assert not [d for key in COMPUTED for d in differences(checkpoint(whole)[key], checkpoint(parts)[key], key)]


def test_processes_train_what_was_unfrozen_together(tmp_path):
    """Two processes compute what one does with batches of twice the size."""
    plain = {"depth": 11, "width_divisor": 16, "dropout": 0.0}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    one, two = (narrow(tmp_path / name, net=plain, optimizer=sgd, lr_factor=0.5) for name in ("one", "two"))
    # Batches of one size, whose mean is the whole's, and nothing that processes draw for themselves.
    same = ("--val_size=250", "--model.mixup=0", "--model.cutmix=0", "--model.initialization=he")
    assert train(one, *same, "--batch_size", "250", at=["train", 1, 0, 0]).code == 143
    start = checkpoint(one)["state_dict"]
    assert train(one, *same, "--batch_size", "250").code == 0
    answer = train(two, *same, "--batch_size", "125", "--devices", "2")
    assert answer.code == 0, answer.err
    expected, found = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for name in ("net.features.0.weight", "net.features.18.weight", "net.classifier.6.weight"):
        moved = (expected[name] - start[name]).norm()
        assert (found[name] - expected[name]).norm() < 0.01 * moved


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--trainer.callbacks.lr_factor=0", "FreezeFeatures: lr_factor=0.0 must lie above 0"),
        ("--trainer.callbacks.epochs=-1", "FreezeFeatures: epochs=-1 must be at least 0"),
        ("--model.net=torchvision.models.resnet18 --data.channels=3 --model.net.num_classes=10", "no part called feat"),
    ],
)
def test_mistakes_of_freezing(flags, says, tmp_path):
    callback = "--trainer.callbacks=callbacks.fine_tuning.FreezeFeatures"
    answer = run_forked(
        "--model", "lenet", f"--data_dir={DATA}", "--val_size=200", callback, *flags.split(), folder=tmp_path
    )
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer
    assert says in answer.err


def test_a_continued_run_keeps_its_freezing(tmp_path):
    folder = narrow(tmp_path / "run")
    assert train(folder, at=["train", 0, 0, 0]).code == 143
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("lr_factor: 0.1", "lr_factor: 0.5"))
    answer = train(folder, "--ckpt_path", "checkpoints/last.ckpt")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer
    assert "the checkpoint was made with trainer.callbacks=" in answer.err
