"""The recipes."""

import json
import re
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from commands import DATA, run_forked
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from benchmarks.readme.entries import read_entries
from callbacks.ema import EMA
from cli.recipes import read_recipe, recipes
from datamodules import FashionMNISTDataModule
from lit_modules import LitClassifier
from models import AlexNet, GoogLeNet, LeNet, NiN

BEST = [name for name in recipes() if name.startswith("best/")]
# How a header tells of a setting that differs from the recipe it starts from; {} is the setting's value.
TOLD = {
    "model.net.init_args.width_divisor": "width",
    "model.net.init_args.batch_norm": "batch norm",
    "model.optimizer.class_path": "{}",
    "model.scheduler.init_args.warmup": "warm-up",
    "model.scheduler.init_args.shape": "{}",
    "model.initialization": "He initialisation",
    "model.output_bias": "class maps",
    "model.label_smoothing": "label smoothing",
    "model.mixup": "mixup",
    "model.cutmix": "cutmix",
    "data.batch_size": "batch {}",
    "data.image_size": "{0}x{0}",
    "data.mean": "normalised pixels",
    "data.crop_padding": "shifts",
    "data.horizontal_flip": "flips",
    "data.random_erasing": "erasing",
    "trainer.max_epochs": " {} epochs",
    "trainer.precision": "float32",
    "trainer.callbacks.EMA": "EMA",
    "trainer.callbacks.Distillation": "teacher",
}


def settings(node, name=""):
    """Every setting by its full name; callbacks by their class's; of a class, the last part."""
    if isinstance(node, list):
        node = {callback["class_path"].rpartition(".")[2]: True for callback in node}
    if not isinstance(node, dict):
        return {name: node.rpartition(".")[2] if isinstance(node, str) else node}
    return {key: value for part in node for key, value in settings(node[part], f"{name}.{part}".strip(".")).items()}


def test_there_is_one_for_each_architecture():
    assert set(BEST) >= {f"best/{name}" for name in ("lenet", "alexnet", "vgg11", "vgg16", "nin", "googlenet")}


@pytest.mark.parametrize("recipe", BEST)
def test_header_and_settings(recipe):
    text = recipes()[recipe].read_text()
    start = {"best/lenet_distilled": "best/lenet"}.get(recipe, recipe.removeprefix("best/"))
    plain, best = read_recipe(start), read_recipe(recipe)
    assert f"# Differs from configs/{start}.yaml:" in text
    (differs,) = re.findall(rf"# Differs from configs/{start}.yaml:(.*(?:\n#  .*)*)", text)
    told = re.sub(r"\s*#?\s+", " ", differs)
    before, now = settings(plain), settings(best)
    for name, words in TOLD.items():
        assert (words.format(now.get(name)) in told) == (now.get(name) != before.get(name)), name
    assert best["model"]["net"]["class_path"] == plain["model"]["net"]["class_path"]
    assert best["model"]["net"]["init_args"]["batch_norm"] is True
    assert best["data"].get("val_size") is None, "selected on validation images, not on all"


@pytest.mark.parametrize("recipe", [one.recipe for one in read_entries() if one.flags == ("--precision", "32-true")])
def test_the_header_names_the_precision_of_the_records(recipe):
    (expected,) = re.findall(r"# Expected: (.*(?:\n#  .*)*)", recipes()[recipe].read_text())
    assert "--precision 32" in expected


@pytest.mark.parametrize(
    ("network", "plain", "channels"),
    [
        (partial(LeNet, image_size=28), 61_706, 6 + 16),
        (partial(AlexNet, image_size=224), 29_983_434, 96 + 256 + 384 + 384 + 256),
        (NiN, 1_992_166, 3 * (96 + 256 + 384 + 10)),
        (GoogLeNet, 5_977_530, None),
    ],
)
def test_batch_norm_stands_between_convolution_and_activation(network, plain, channels):
    with torch.device("meta"):
        without, net = network(), network(batch_norm=True)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert sum(parameter.numel() for parameter in without.parameters()) == plain
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    norms = sum(layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm2d))
    assert count == plain + 2 * norms
    if channels is not None:
        assert norms == channels
    for layer, following in pairwise(layers):
        assert isinstance(following, nn.BatchNorm2d) == isinstance(layer, nn.Conv2d)


class Weights(Callback):
    """Keeps the weights of each step; stands before EMA."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def normed():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))


def averaged_run(folder, ema):
    """Two epochs of five steps, what each step left, and the last checkpoint."""
    torch.manual_seed(0)
    net = normed()
    weights = Weights()
    trainer = pl.Trainer(
        callbacks=[weights, ema],
        default_root_dir=folder,
        max_epochs=2,
        limit_train_batches=5,
        limit_val_batches=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    lit = LitClassifier(net, partial(torch.optim.SGD, lr=0.1))
    data = FashionMNISTDataModule(str(DATA), batch_size=100, val_size=200)
    trainer.fit(lit, data)
    return trainer, lit, data, weights.steps


@pytest.mark.parametrize(("decay", "used"), [(0.3, False), (0.999, False), (0.3, True)])
def test_ema_warms_up_and_ends_as_the_network(decay, used, tmp_path):
    ema = EMA(decay)
    if used:
        averaged_run(tmp_path / "before", ema)
    trainer, lit, data, steps = averaged_run(tmp_path, ema)
    expected = {name: value for name, value in steps[0].items() if value.is_floating_point()}
    for updates, step in enumerate(steps[1:], start=1):
        share = min(decay, (1 + updates) / (10 + updates))
        expected = {name: share * value + (1 - share) * step[name] for name, value in expected.items()}
    found = lit.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert not torch.equal(value, steps[-1][name])
    # Testing a checkpoint in the same process measures the average, not what training would go on from.
    path = str(trainer.checkpoint_callback.best_model_path)
    (after,) = trainer.test(lit, data, verbose=False)
    (loaded,) = trainer.test(lit, data, ckpt_path=path, verbose=False, weights_only=False)  # made just above
    assert loaded == after
    saved = torch.load(path, weights_only=False)["state_dict"]  # made just above
    assert all(torch.equal(saved[name], value) for name, value in lit.state_dict().items())


def test_validation_after_training_measures_the_network_that_is_given(tmp_path):
    trainer, _, data, _ = averaged_run(tmp_path, EMA(0.3))
    other = normed()
    (found,) = trainer.validate(LitClassifier(other), data, verbose=False)
    images, labels = data.val_set[torch.arange(100)]  # the one batch
    expected = F.cross_entropy(other.eval()(data.preprocess(images)), labels)
    assert found["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        EMA(decay)


def test_a_best_recipe_trains_tests_and_is_tested_again(tmp_path):
    flags = f"--model best/lenet --data_dir {DATA} --val_size 200 --max_epochs 2 --accelerator cpu --devices 1"
    fitted = run_forked(*flags.split(), folder=tmp_path)
    assert (fitted.code, fitted.err) == (0, "")
    run = tmp_path / "logs" / "best" / "lenet" / "version_0"
    test = json.loads((run / "record.json").read_text())["test"]
    scores = f"accuracy {test['accuracy']:.4f}, loss {test['loss']:.4f}; averaged with the mirror images: "
    scores += f"accuracy {test['accuracy_flip']:.4f}, loss {test['loss_flip']:.4f}\n"
    assert f"Test on 500 images: {scores}" in fitted.out
    tested = run_forked("test", "--ckpt_path", "logs/best/lenet/version_0/checkpoints/best.ckpt", folder=tmp_path)
    assert (tested.code, tested.err) == (0, "")
    assert tested.out == f"test on 500 images: {scores}"
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    name = "net.classifier.1.weight"
    assert not torch.equal(content["state_dict"][name], content["current_model_state"][name])
