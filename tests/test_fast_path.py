"""The fast path computes what a plain loop computes: channels-last, fused, in-place, batched loading, the Trainer."""

import copy
import pickle
import statistics
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from benchmarks.memory import LiveBytes
from datamodules import FashionMNISTDataModule
from datamodules.fashion_mnist import ImageTensors, TrainBatches
from errors import UserError
from launch.checks import check_accumulation
from lit_modules import LitClassifier
from lit_modules.classifier import _he_initialization
from lit_modules.execution.activation_checkpointing import apply_activation_checkpointing
from models import VGG, AlexNet, GoogLeNet, LeNet, NiN

STEPS = 50
# (network without dropout, whose mask depends on the memory format; image size; batch size)
NETWORKS = [
    pytest.param(lambda: LeNet(), 28, 32, id="lenet"),
    pytest.param(lambda: AlexNet(image_size=67, dropout=0), 67, 8, id="alexnet"),
    pytest.param(lambda: VGG(width_divisor=8, image_size=32, dropout=0), 32, 16, id="vgg11_small"),
    pytest.param(lambda: NiN(dropout=0), 67, 8, id="nin"),
    pytest.param(lambda: GoogLeNet(), 32, 8, id="googlenet"),
]
# Training magnifies rounding errors until two curves part, whatever the loops: a maximum of two nearly equal numbers is
# enough. So the tutorials' learning rate is compared in float64, with an initialization that trains from the first step
# on, and float32 with a learning rate that leaves the errors small.
PRECISIONS = [
    pytest.param("64-true", torch.float64, 1e-3, _he_initialization, id="float64"),
    pytest.param("32-true", torch.float32, 1e-5, lambda module: None, id="float32"),
]


def _start_of(epoch: int) -> tuple[int, int]:
    return epoch, 0


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def data_module(image_size: int, batch_size: int, **settings) -> FashionMNISTDataModule:
    return FashionMNISTDataModule("tests/data", batch_size, image_size, val_size=100, **settings)


def trainer_losses(net, image_size, batch_size, lr, precision, **settings) -> list[float]:
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=STEPS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=losses,
    )
    model = LitClassifier(net, partial(torch.optim.Adam, lr=lr, fused=True))
    trainer.fit(model, data_module(image_size, batch_size, **settings))
    return losses.values


def plain_losses(net, image_size, batch_size, lr, dtype) -> list[float]:
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    data = data_module(image_size, batch_size)
    data.prepare_data()
    data.setup("fit")
    images, labels = data.train_set.images, data.train_set.labels
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, foreach=False, fused=False)
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS:
        for indices in TrainBatches(len(labels), batch_size, position=partial(_start_of, epoch)):
            inputs = torch.stack([images[index].float() / 255 for index in indices])
            if image_size != 28:
                inputs = F.interpolate(inputs, (image_size, image_size), mode="bilinear")
            loss = F.cross_entropy(net(inputs.to(dtype)), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == STEPS:
                break
        epoch += 1
    return losses


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You have overridden `on_before_batch")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated", "ignore:`isinstance.treespec")
@pytest.mark.parametrize(("build", "image_size", "batch_size"), NETWORKS)
@pytest.mark.parametrize(("precision", "dtype", "lr", "initialize"), PRECISIONS)
def test_loss_curve_is_the_plain_loops(build, image_size, batch_size, precision, dtype, lr, initialize):
    pl.seed_everything(0, verbose=False)
    net, plain = build(), build()
    net.apply(initialize)
    plain.load_state_dict(net.state_dict())

    ours = trainer_losses(net, image_size, batch_size, lr, precision)
    theirs = plain_losses(plain.to(dtype), image_size, batch_size, lr, dtype)

    assert ours == pytest.approx(theirs, rel=1e-4)
    assert statistics.mean(theirs[-10:]) < statistics.mean(theirs[:10])  # it did train


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You have overridden `on_before_batch")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated", "ignore:`isinstance.treespec")
def test_data_set_on_the_device_changes_nothing():
    runs = []
    for on_device in (False, True):
        pl.seed_everything(0, verbose=False)
        augmented = {"crop_padding": 2, "horizontal_flip": True, "dataset_on_device": on_device}
        runs.append(trainer_losses(LeNet(), 28, 32, 1e-3, "32-true", **augmented))

    assert runs[0] == runs[1]


def test_data_set_moves_whole_to_another_device():
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    moved = ImageTensors(images, torch.arange(3)).to(torch.device("meta"))

    batch, labels = moved.__getitems__(torch.tensor([2, 0]))

    assert (batch.device.type, labels.device.type) == ("meta", "meta")
    assert batch.shape == (2, 1, 28, 28)
    assert labels.shape == (2,)


def test_workers_can_not_reach_a_data_set_on_the_device():
    with pytest.raises(ValueError, match=r"dataset_on_device needs data\.num_workers=0"):
        data_module(28, 8, dataset_on_device=True, num_workers=1)


def test_one_compilation_serves_all_batch_sizes():
    model = LitClassifier(LeNet(), compile=True)
    model.net.compile(backend="eager")  # counts as any other, and needs no C++ compiler
    torch._dynamo.reset()
    counters.clear()

    for size in (8, 8, 5):
        model(torch.rand(size, 1, 28, 28)).sum().backward()
    trained = counters["stats"]["unique_graphs"]
    model.eval()
    with torch.no_grad():
        for size in (8, 3):
            model(torch.rand(size, 1, 28, 28))

    assert trained == 1
    assert counters["stats"]["unique_graphs"] == 2


def test_cuda_graphs_serve_full_batches_alone():
    torch.manual_seed(0)
    plain = LitClassifier(LeNet())
    model = LitClassifier(LeNet(), compile="reduce-overhead")
    model.load_state_dict(plain.state_dict())
    shapes = []

    def backend(graph, inputs):
        """As a graph on the device does: takes one shape, and writes all its results to the same place."""
        place = graph(*inputs)[0].detach().clone()
        shapes.append(tuple(place.shape))

        def replay(*arguments):
            result = graph(*arguments)[0]
            return (result if result.requires_grad else place.copy_(result),)

        return replay

    torch._dynamo.reset()
    model.net.compile(backend=backend, dynamic=False)
    batches = [torch.rand(size, 1, 28, 28) for size in (8, 8, 5)]
    for images in batches:
        torch.testing.assert_close(model(images), plain(images))
    trained = list(shapes)
    model.eval()
    with torch.no_grad():
        logits = [model(images) for images in batches]

        assert (trained, shapes) == ([(8, 10)], [(8, 10), (8, 10)])
        for images, found in zip(batches, logits, strict=True):
            torch.testing.assert_close(found, plain(images))


def test_cuda_graphs_do_not_sum_gradients():
    with pytest.raises(UserError, match=r"accumulate_grad_batches=2.* use --compile"):
        check_accumulation("reduce-overhead", 2)
    for compile, batches in ((True, 2), ("max-autotune-no-cudagraphs", 2), ("reduce-overhead", 1)):
        check_accumulation(compile, batches)


# Networks with all that computing a stage twice could spoil.
STATEFUL = [
    pytest.param(lambda: LeNet(batch_norm=True), 28, 16, id="lenet"),
    pytest.param(lambda: AlexNet(image_size=67, batch_norm=True), 67, 8, id="alexnet"),
    pytest.param(lambda: VGG(width_divisor=8, image_size=32, batch_norm=True), 32, 16, id="vgg11_small"),
    pytest.param(lambda: NiN(batch_norm=True), 67, 4, id="nin"),
    pytest.param(lambda: GoogLeNet(batch_norm=True), 32, 4, id="googlenet"),
]


@pytest.mark.parametrize(("build", "image_size", "batch_size"), STATEFUL)
def test_checkpointed_activations_change_memory_alone(build, image_size, batch_size):
    torch.manual_seed(0)
    plain = build()
    checkpointed = copy.deepcopy(plain)
    apply_activation_checkpointing(checkpointed)
    nets = [plain, checkpointed, copy.deepcopy(checkpointed), pickle.loads(pickle.dumps(checkpointed))]
    images, labels = torch.rand(batch_size, 1, image_size, image_size), torch.arange(batch_size) % 10
    kept, found = [], []
    for net in nets:
        torch.manual_seed(1)
        with LiveBytes() as live:
            logits = net(images)
        kept.append(live.now)
        F.cross_entropy(logits, labels).backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        found.append([logits, torch.rand(1), *gradients, *net.buffers()])

    for net, values in zip(nets[1:], found[1:], strict=True):
        assert list(net.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(values, found[0], strict=True))
    assert max(kept[1:3]) < 0.6 * kept[0]
    for net in nets:
        net.eval()
    torch.testing.assert_close(checkpointed(images), plain(images), rtol=0, atol=0)


def test_a_stage_that_overwrites_its_input_is_refused():
    net = nn.Sequential(nn.Sequential(nn.ELU(inplace=True), nn.Conv2d(1, 2, 3)))
    apply_activation_checkpointing(net)

    with pytest.raises(UserError, match="ELU changes its input in place"):
        net(torch.rand(1, 1, 8, 8))


def test_a_layer_in_place_after_a_pooling_stays_in_its_stage():
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ELU(inplace=True), nn.Conv2d(2, 2, 3), nn.MaxPool2d(2))
    )
    plain = copy.deepcopy(net)
    apply_activation_checkpointing(net)
    images = torch.rand(2, 1, 16, 16)

    expected, found = (torch.autograd.grad(one(images).square().sum(), list(one.parameters())) for one in (plain, net))

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_activations_that_can_not_be_checkpointed():
    with pytest.raises(ValueError, match=r"Linear has no nn\.Sequential with convolutions"):
        LitClassifier(nn.Linear(2, 2), checkpoint_activations=True)
    with pytest.raises(ValueError, match="compile exclude each other"):
        LitClassifier(LeNet(), compile=True, checkpoint_activations=True)
