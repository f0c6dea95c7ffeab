"""Every tag that a run leaves for TensorBoard is read back and held against values computed apart."""

import io
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DATA, run_forked
from conftest import Run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from callbacks.confusion import Mistake
from callbacks.tensorboard import drawing as pictures
from callbacks.tensorboard.pictures import is_drawn
from datamodules import CLASS_NAMES, FashionMNISTDataModule
from inspection.graph import network_graph
from lit_modules import LitClassifier
from models import GoogLeNet, LeNet
from pictures.mistakes import explain_mistakes

CLASS_TAGS = {f"val_class_accuracy/{name}" for name in CLASS_NAMES}
SCALARS = CLASS_TAGS | {
    *(f"{stage}/{metric}" for stage in ("train", "val", "test") for metric in ("loss", "accuracy")),
    *("best/val_accuracy", "speed/images_per_second", "speed/epoch_seconds", "epoch"),
}
FEATURE_MAPS = {
    "feature_maps/01_features.0_Conv2d_6x28x28": 2,  # to the number of layers that lead there, ReLU included
    "feature_maps/02_features.2_MaxPool2d_6x14x14": 3,
    "feature_maps/03_features.3_Conv2d_16x10x10": 5,
    "feature_maps/04_features.5_MaxPool2d_16x5x5": 6,
}
EVERY_EPOCH = {"validation/confusion_matrix", "validation/most_confident_mistakes", "filters/first_layer"}
EVERY_EPOCH |= FEATURE_MAPS.keys()
# Once, after training and after testing, where the optional package is there.
EXPLAINED = {f"{stage}/most_confident_mistakes_explained" for stage in ("validation", "test") if find_spec("captum")}


@pytest.fixture(scope="module")
def events(trained: Run) -> EventAccumulator:
    return read(trained.folder)


def normalised(images: Tensor) -> Tensor:
    """What the network sees of images (N, 1, 28, 28) uint8, by the recipe's mean and deviation."""
    return (images / torch.tensor(255.0) - 0.286) / 0.353


class Apart:
    """The last checkpoint's validation results, computed without any of the code under test."""

    def __init__(self, folder: Path, val_size: int = 297, batch_size: int = 32) -> None:
        weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        self.net: Any = LeNet().eval().to(memory_format=torch.channels_last)
        self.net.load_state_dict({name.removeprefix("net."): weights[name] for name in weights if "net." in name})
        data = FashionMNISTDataModule(str(DATA), val_size=val_size)
        data.setup("fit")
        self.train, self.images, self.labels = data.train_set, data.val_set.images, data.val_set.labels
        with torch.no_grad():
            batches = [self.net(normalised(batch)) for batch in self.images.split(batch_size)]
        self.logits = torch.cat(batches)


@pytest.fixture(scope="module")
def apart(trained: Run) -> Apart:
    return Apart(trained.folder)


def read(folder: Path) -> EventAccumulator:
    everything = dict.fromkeys(("images", "scalars", "histograms", "tensors"), 0)
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def last_picture(events: EventAccumulator, tag: str) -> Tensor:
    return pixels(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))


def pixels(picture: Image.Image) -> Tensor:
    picture = picture.convert("RGB")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


def test_every_tag_is_there_at_every_epoch(events: EventAccumulator) -> None:
    tags = events.Tags()
    rates = {tag for tag in tags["scalars"] if tag.startswith("lr")}
    steps = {tag for tag in tags["scalars"] if tag == "train/loss_step"}
    assert set(tags["scalars"]) - rates - steps == SCALARS
    assert set(tags["images"]) == EVERY_EPOCH | EXPLAINED | {"inputs/training_images"}
    assert tags["graph"]
    validated = [event.step for event in events.Scalars("val/accuracy")]
    assert len(validated) == 3
    for tag in EVERY_EPOCH:
        assert [image.step for image in events.Images(tag)] == validated, tag
    for tag in EXPLAINED:
        step = validated[-1] if tag.startswith("validation") else events.Scalars("test/accuracy")[0].step
        assert [image.step for image in events.Images(tag)] == [step], tag
    for tag in CLASS_TAGS:
        assert [event.step for event in events.Scalars(tag)] == validated, tag


def test_validation_scalars_are_torchmetrics_values(events: EventAccumulator, apart: Apart) -> None:
    expected = multiclass_accuracy(apart.logits, apart.labels, num_classes=10, average=None)
    for name, accuracy in zip(CLASS_NAMES, expected.tolist(), strict=True):
        assert events.Scalars(f"val_class_accuracy/{name}")[-1].value == pytest.approx(accuracy), name
    overall = multiclass_accuracy(apart.logits, apart.labels, num_classes=10, average="micro")
    assert events.Scalars("val/accuracy")[-1].value == pytest.approx(overall.item())
    loss = F.cross_entropy(apart.logits, apart.labels)
    assert events.Scalars("val/loss")[-1].value == pytest.approx(loss.item(), rel=1e-5)


def test_confusion_matrix_shows_torchmetrics_counts(events: EventAccumulator, apart: Apart) -> None:
    counts = multiclass_confusion_matrix(apart.logits, apart.labels, num_classes=10)
    assert counts.sum() == 297
    expected = pixels(pictures.confusion_matrix(counts, CLASS_NAMES))
    assert torch.equal(last_picture(events, "validation/confusion_matrix"), expected)
    assert not torch.equal(expected, pixels(pictures.confusion_matrix(counts.T, CLASS_NAMES)))


def test_most_confident_mistakes_are_the_most_confident_ones(events: EventAccumulator, apart: Apart) -> None:
    probabilities = apart.logits.softmax(dim=1)
    wrong = [index for index in range(297) if probabilities[index].argmax() != apart.labels[index]]
    worst = sorted(wrong, key=lambda index: -probabilities[index].max().item())[:16]
    assert len(worst) == 16
    expected = pictures.mistakes(
        apart.images[worst, 0],
        [CLASS_NAMES[label] for label in apart.labels[worst].tolist()],
        [CLASS_NAMES[guess] for guess in probabilities[worst].argmax(dim=1).tolist()],
        probabilities[worst].amax(dim=1).tolist(),
    )
    assert torch.equal(last_picture(events, "validation/most_confident_mistakes"), pixels(expected))


@pytest.mark.skipif(not EXPLAINED, reason="captum is not installed")
def test_explained_mistakes_are_the_most_confident_ones(events: EventAccumulator, apart: Apart, trained: Run) -> None:
    """Of the last weights in validation; in the test, of the best ones, which are loaded for it."""
    data = FashionMNISTDataModule.load_from_checkpoint(trained.best, data_dir=str(DATA))
    data.setup("test")
    best = LitClassifier.load_from_checkpoint(trained.best).net
    test_images = data.test_set.images
    with torch.no_grad():
        test_logits = torch.cat([best(normalised(batch)) for batch in test_images.split(32)])
    for stage, net, images, labels, logits in (
        ("validation", apart.net, apart.images, apart.labels, apart.logits),
        ("test", best, test_images, data.test_set.labels, test_logits),
    ):
        sure, guesses = logits.softmax(dim=1).max(dim=1)
        worst = (sure * (guesses != labels)).argsort(descending=True, stable=True)[:8].tolist()
        mistakes = [Mistake(i, int(labels[i]), int(guesses[i]), float(sure[i])) for i in worst]
        expected = explain_mistakes(net, data, images[worst, 0], mistakes, CLASS_NAMES)
        quantized = pixels(expected.quantize(256, dither=Image.Dither.NONE))
        assert torch.equal(last_picture(events, f"{stage}/most_confident_mistakes_explained"), quantized)


def without_captum() -> None:
    sys.modules["captum"] = None  # type: ignore[assignment]


def test_without_captum_nothing_is_explained_and_nothing_said(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 1 --batch_size 250 --accelerator cpu --devices 1"
    answer = run_forked("fit", *flags.split(), f"--data_dir={DATA}", folder=tmp_path, prepare=without_captum)
    assert (answer.code, answer.err) == (0, "")
    assert "captum" not in answer.out
    tags = read(tmp_path / "logs" / "lenet" / "version_0").Tags()["images"]
    assert set(tags) == EVERY_EPOCH | {"inputs/training_images"}


def test_filters_are_the_weights_and_change(events: EventAccumulator, apart: Apart) -> None:
    expected = pixels(pictures.filters(apart.net.features[0].weight.detach()))
    assert torch.equal(last_picture(events, "filters/first_layer"), expected)
    first, *_, last = (image.encoded_image_string for image in events.Images("filters/first_layer"))
    assert first != last


@pytest.mark.parametrize(("tag", "layers"), FEATURE_MAPS.items())
def test_feature_maps_are_the_outputs_of_the_stages(
    events: EventAccumulator, apart: Apart, tag: str, layers: int
) -> None:
    with torch.no_grad():
        maps = apart.net.features[:layers](normalised(apart.images[:1]))[0]
    assert torch.equal(last_picture(events, tag), pixels(pictures.feature_maps(maps)))


def test_inputs_are_the_first_training_batch(events: EventAccumulator, apart: Apart) -> None:
    order = torch.randperm(len(apart.train), generator=torch.Generator().manual_seed(0))[:16]  # seed 0, epoch 0
    names = [CLASS_NAMES[label] for label in apart.train.labels[order].tolist()]
    expected = pictures.inputs(normalised(apart.train.images[order]), names)
    assert torch.equal(last_picture(events, "inputs/training_images"), pixels(expected))
    assert len(events.Images("inputs/training_images")) == 1


def test_graph_has_all_layers_and_parameters(events: EventAccumulator) -> None:
    graph = events.Graph()
    nodes = {node.name: node for node in graph.node}
    chain = ["images", *(node.name for node in graph.node if re.match(r"\d\d_", node.name)), "logits"]
    assert [node.name for node in graph.node] == chain
    assert [list(node.input) for node in graph.node] == [[], *([name] for name in chain[:-1])]
    assert sum(node.attr["parameters"].i for node in graph.node) == 61_706
    assert shape(nodes["04_Conv2d/features.3"]) == [1, 16, 10, 10]


def shape(node: Any) -> list[int]:
    return [dim.size for dim in node.attr["_output_shapes"].list.shape[0].dim]


def test_graph_of_branches_joins_them() -> None:
    graph: GraphDef = network_graph(GoogLeNet(), (1, 96, 96))
    nodes = {node.name: node for node in graph.node}
    joint = nodes["features.stage3/0_Inception/cat_0"]
    assert len(joint.input) == 4
    assert shape(joint) == [1, 256, 12, 12]
    heads = [node.name for node in graph.node if list(node.input) == ["features.stage2/2_MaxPool2d"]]
    assert len(heads) == 4
    assert sum(node.attr["parameters"].i for node in graph.node) == 5_977_530


def test_graph_leaves_the_network_as_it_was() -> None:
    net = GoogLeNet(batch_norm=True).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    network_graph(net, (1, 96, 96))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_layout_overlays_the_curves_of_both_stages(events: EventAccumulator) -> None:
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    scalars = [*events.Tags()["scalars"], "train/loss_step"]  # which must not be drawn with the epochs'

    def shown(title: str) -> set[str]:
        return {tag for tag in scalars if any(re.match(pattern, tag) for pattern in charts[title])}

    assert shown("loss") == {"train/loss", "val/loss"}
    assert shown("accuracy") == {"train/accuracy", "val/accuracy"}
    assert shown("validation accuracy by class") == CLASS_TAGS


def test_hyperparameters_have_the_scalars_as_metrics(events: EventAccumulator) -> None:
    metadata = events.summary_metadata["_hparams_/experiment"]
    experiment = HParamsPluginData.FromString(metadata.plugin_data.content).experiment
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics == ["test/accuracy", "test/loss", "best/val_accuracy"]
    assert all(len(events.Scalars(tag)) == 1 for tag in metrics)
    first = {info.name for info in experiment.hparam_infos if info.differs}
    assert first == {"recipe", "model.optimizer.lr", "data.batch_size", "max_epochs", "seed"}
    start = events.summary_metadata["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(start.plugin_data.content).session_start_info.hparams
    assert values["recipe"].string_value == "lenet"
    assert values["data.batch_size"].number_value == 32


def test_a_long_run_draws_about_ten_times(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 25 --accelerator cpu --devices 1 --patience 21 --lr 1e-12"
    fast = "--trainer.limit_train_batches 1 --trainer.limit_val_batches 1 --batch_size 297"
    answer = run_forked("fit", *flags.split(), *fast.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    folder = tmp_path / "logs" / "lenet" / "version_0"
    events = read(folder)
    # After the first epoch, every third, and the 22nd, with which the run ends early; steps count from 0.
    drawn = [0, 2, 5, 8, 11, 14, 17, 20, 21]
    for tag in EVERY_EPOCH:
        assert [image.step for image in events.Images(tag)] == drawn, tag
    assert [event.step for event in events.Scalars("val_class_accuracy/Bag")] == list(range(22))
    pictures_size = sum(len(image.encoded_image_string) for tag in EVERY_EPOCH for image in events.Images(tag))
    size = sum(path.stat().st_size for path in folder.glob("events*"))
    assert size - pictures_size < 22 * 3_000 + 60_000  # an epoch's scalars, and what is there once


@pytest.mark.parametrize(("epochs", "times"), [(3, 3), (10, 10), (11, 7), (200, 11), (1000, 11), (-1, 10)])
def test_number_of_times_that_pictures_are_drawn(epochs: int, times: int) -> None:
    drawn = [epoch for epoch in range(1, (epochs if epochs > 0 else 1000) + 1) if is_drawn(epoch, epochs)]
    assert len(drawn) == times
    assert drawn[0] == 1
    assert drawn[-1] == epochs or epochs < 0


def test_pictures_do_not_change_training(trained: Run, tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 3 --batch_size 32 --accelerator cpu --devices 1"
    answer = run_forked("fit", *flags.split(), f"--data_dir={DATA}", "--trainer.logger=false", folder=tmp_path)
    assert answer.code == 0, answer.err
    (plain,) = tmp_path.rglob("last.ckpt")
    weights = torch.load(plain, weights_only=True)["state_dict"]
    pictured = torch.load(trained.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert weights.keys() == pictured.keys()
    assert all(torch.equal(weights[name], pictured[name]) for name in weights)


def test_histograms_on_request_and_without_validation(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 0 --max_epochs 1 --batch_size 100 --accelerator cpu --devices 1 --histograms"
    answer = run_forked(*flags.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    folder = tmp_path / "logs" / "lenet" / "version_0"
    events = read(folder)
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    names = [name.removeprefix("net.") for name in weights if name.startswith("net.")]
    tags = {f"{kind}/{name}" for kind in ("weights", "gradient_norms") for name in names}
    assert set(events.Tags()["histograms"]) == tags
    shown = events.Histograms("weights/features.0.weight")[-1].histogram_value
    expected = weights["net.features.0.weight"]
    assert (shown.min, shown.max, shown.num) == pytest.approx((expected.min().item(), expected.max().item(), 150))
    norms = events.Histograms("gradient_norms/classifier.5.bias")[-1].histogram_value
    assert norms.num == 15  # 1,500 images in steps of 100
    assert norms.min > 0
    assert "validation/confusion_matrix" not in events.Tags()["images"]
    assert FEATURE_MAPS.keys() < set(events.Tags()["images"])


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 1 --batch_size 32 --accelerator cpu --devices 2"
    answer = run_forked(*flags.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    folder = tmp_path / "logs" / "lenet" / "version_0"
    events, apart = read(folder), Apart(folder)
    counts = multiclass_confusion_matrix(apart.logits, apart.labels, num_classes=10)
    expected = pixels(pictures.confusion_matrix(counts, CLASS_NAMES))
    assert torch.equal(last_picture(events, "validation/confusion_matrix"), expected)
    for tag in ("validation/most_confident_mistakes", *EXPLAINED):
        assert len(events.Images(tag)) == 1, tag
    per_class = multiclass_accuracy(apart.logits, apart.labels, num_classes=10, average=None)
    assert events.Scalars("val_class_accuracy/Bag")[-1].value == pytest.approx(per_class[8].item())


def test_grid_places_tiles_row_by_row() -> None:
    tiles = torch.arange(1, 4, dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    grid = pixels(pictures.grid(tiles, columns=2, scale=2, background=9))[:, :, 0]
    assert grid.shape == (4 + 2 + 4, 4 + 2 + 4)
    assert grid[:4, :4].unique().tolist() == [1]
    assert grid[:4, 6:].unique().tolist() == [2]
    assert grid[6:, :4].unique().tolist() == [3]
    assert grid[4:6].unique().tolist() == [9]
    assert grid[6:, 6:].unique().tolist() == [9]


def test_filters_show_zero_as_grey_and_each_at_full_contrast() -> None:
    weight = torch.zeros(2, 1, 1, 2)
    weight[0, 0, 0, 0], weight[1, 0, 0, 0] = 0.5, -3.0
    picture = pixels(pictures.filters(weight))[:, :, 0]
    levels = picture.unique().tolist()
    assert levels == [0, 128, 255]
    assert pictures.filters(torch.randn(96, 3, 11, 11)).mode == "RGB"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_feature_maps_without_contrast_are_drawn(value: float) -> None:
    picture = pictures.feature_maps(torch.full((5, 6, 6), value))
    assert pixels(picture)[0, 0].tolist() == [68, 1, 84]


def test_confusion_matrix_is_blue_where_right_and_orange_where_wrong() -> None:
    picture = pixels(pictures.confusion_matrix(torch.tensor([[10, 0], [5, 5]]), ["first", "second"])).int()
    cell, left, head = 36, 86, 84
    corners = picture[head + 2 :: cell, left + 2 :: cell][:2, :2]  # where no digit stands
    red, blue = corners[..., 0], corners[..., 2]
    assert (blue > red).tolist() == [[True, False], [False, True]]
    assert corners[0, 1].tolist() == [255, 255, 255]
    assert red[1, 0] > blue[1, 0]


def test_no_mistakes_is_said() -> None:
    picture = pictures.mistakes(torch.empty(0, 28, 28, dtype=torch.uint8), [], [], [])
    assert (pixels(picture) < 128).any()


def test_large_inputs_are_shrunk_and_small_ones_enlarged() -> None:
    large = pictures.enlarge(torch.randint(0, 256, (2, 224, 224), dtype=torch.uint8))
    assert large.shape == (2, 112, 112)
    small = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    assert torch.equal(pictures.enlarge(small)[:, ::4, ::4], small)


def test_compiled_and_plain_networks_have_one_graph() -> None:
    net: Any = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 3))
    plain = network_graph(net, (1, 8, 8))
    net.compile()
    assert network_graph(net, (1, 8, 8)) == plain
