"""The temperature that makes probabilities honest."""

import math

import pytest
import torch
from commands import DATA, run
from torch.nn import functional as F

from callbacks.temperature import GRID, best_temperature
from datamodules import FashionMNISTDataModule
from lit_modules import LitClassifier


def optimum(logits, labels):
    """By brute force."""
    temperatures = torch.linspace(math.log(0.2), math.log(20), 20_001).exp()
    losses = [F.cross_entropy(logits / temperature, labels) for temperature in temperatures[::20]]
    near = int(torch.stack(losses).argmin()) * 20
    around = temperatures[max(0, near - 40) : near + 41]
    return float(
        around[torch.stack([F.cross_entropy(logits / temperature, labels) for temperature in around]).argmin()]
    )


def on_grid(logits, labels):
    return torch.stack([F.cross_entropy(logits / place.exp(), labels, reduction="sum") for place in GRID]).double()


@pytest.mark.parametrize("truth", [0.4, 1.0, 1.7, 6.0])
def test_recovers_how_overconfident_logits_are(truth):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    found = best_temperature(on_grid(truth * logits, labels))
    assert found == pytest.approx(truth, rel=0.06)  # of drawn labels
    assert found == pytest.approx(optimum(truth * logits, labels), rel=0.002)


@pytest.mark.parametrize("losses", [torch.zeros(len(GRID)), torch.full((len(GRID),), torch.nan)])
def test_says_nothing_without_images_or_with_nan(losses):
    assert best_temperature(losses) is None


def test_stays_on_the_grid_if_all_is_right():
    logits = 5 * torch.eye(10)
    assert best_temperature(on_grid(logits, torch.arange(10))) == pytest.approx(0.2)


def val_logits(path):
    classifier = LitClassifier.load_from_checkpoint(path)
    data = FashionMNISTDataModule.load_from_checkpoint(path)
    data.setup("fit")
    classifier.eval()
    with torch.no_grad():
        return classifier, classifier(data.preprocess(data.val_set.images)), data.val_set.labels


def test_each_checkpoint_holds_that_of_its_own_weights(trained):
    for path in (trained.best, trained.best.with_name("last.ckpt")):
        classifier, logits, labels = val_logits(path)
        assert type(torch.load(path, weights_only=True)["temperature"]) is float
        assert classifier.temperature == pytest.approx(optimum(logits, labels), rel=0.002)
        assert classifier.temperature != 1


@pytest.mark.slow
def test_two_processes_fit_it_on_all_validation_images(tmp_path):
    flags = "fit --model lenet --val_size 297 --max_epochs 1 --batch_size 32 --accelerator cpu --devices 2"
    answer = run(*flags.split(), f"--data_dir={DATA}", folder=tmp_path, timeout=300)
    assert answer.code == 0, answer.err
    classifier, logits, labels = val_logits(tmp_path / "logs" / "lenet" / "version_0" / "checkpoints" / "best.ckpt")
    assert classifier.temperature == pytest.approx(optimum(logits, labels), rel=0.002)


def test_is_1_without_validation_images(tmp_path):
    flags = "fit --model lenet --val_size 0 --max_epochs 1 --batch_size 128 --accelerator cpu --devices 1"
    answer = run(*flags.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    path = tmp_path / "logs" / "lenet" / "version_0" / "checkpoints" / "last.ckpt"
    assert LitClassifier.load_from_checkpoint(path).temperature == 1


def test_probabilities_are_calibrated_and_leave_the_mode_alone(trained):
    classifier = LitClassifier.load_from_checkpoint(trained.best)
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    classifier.train()
    probabilities = classifier.probabilities(images)
    assert classifier.net.training
    assert not probabilities.requires_grad
    expected = (classifier.net(images) / classifier.temperature).softmax(dim=1)
    assert torch.allclose(probabilities, expected)


@pytest.mark.parametrize("stored", [math.nan, 0.0, -1.0, math.inf, "2", None])
def test_a_senseless_one_in_a_checkpoint_counts_as_1(trained, stored):
    classifier = LitClassifier.load_from_checkpoint(trained.best)
    classifier.on_load_checkpoint({"temperature": stored})
    assert classifier.temperature == 1
