"""The five networks against the published sizes, against torchvision, and against wrong arguments."""

import re
from itertools import groupby

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import VGG, AlexNet, GoogLeNet, LeNet, NiN
from models.googlenet import Inception

# (network, arguments, image size, parameters, FLOPs of one image's forward pass in 1e9 to three digits)
PUBLISHED = [
    (AlexNet, {}, 224, 29_983_434, 1.843),
    (AlexNet, {"hidden_layers": 2}, 224, 46_764_746, None),
    (AlexNet, {"width_divisor": 2, "batch_norm": True, "image_size": 112}, 112, 2_006_730, None),
    (VGG, {}, 224, 128_806_154, 15.094),
    (VGG, {"width_divisor": 8}, 224, 2_018_346, 0.242),
    (VGG, {"width_divisor": 8, "blocks": 3, "no_hidden_layers": True, "image_size": 28}, 28, 18_026, None),
    (NiN, {}, 224, 1_992_166, 1.525),
    (GoogLeNet, {}, 96, 5_977_530, 0.552),
    (LeNet, {}, 28, 61_706, None),
    (LeNet, {"activation": "sigmoid", "pooling": "average", "padding": 0}, 28, 44_426, None),
]

# (network, arguments, image size, outputs of the stages; an output equal to the one before is listed once)
STAGES = [
    (
        AlexNet,
        {},
        224,
        "96x54x54 96x26x26 256x26x26 256x12x12 384x12x12 256x12x12 256x5x5 6400 4096 10",
    ),
    (
        VGG,
        {},
        224,
        "64x224x224 64x112x112 128x112x112 128x56x56 256x56x56 256x28x28 512x28x28 512x14x14 512x7x7 25088 4096 10",
    ),
    (
        VGG,
        {"width_divisor": 8},
        224,
        "8x224x224 8x112x112 16x112x112 16x56x56 32x56x56 32x28x28 64x28x28 64x14x14 64x7x7 3136 512 10",
    ),
    (
        NiN,
        {},
        224,
        "96x54x54 96x26x26 256x26x26 256x12x12 384x12x12 384x5x5 10x5x5 10x1x1 10",
    ),
    (GoogLeNet, {}, 96, "64x24x24 192x12x12 480x6x6 832x3x3 1024x1x1 1024 10"),
    (LeNet, {}, 28, "6x28x28 6x14x14 16x10x10 16x5x5 400 120 84 10"),
    (LeNet, {"padding": 0}, 28, "6x24x24 6x12x12 16x8x8 16x4x4 256 120 84 10"),
]

# Layers without children in the order of construction; shapes alone would miss an activation.
CONV = "Conv2d ReLU "
NORMED = "Conv2d BatchNorm2d ReLU "
HIDDEN = "Linear ReLU Dropout "
SHORT = {"batch_norm": True, "no_hidden_layers": True, "pool_first": True}  # as in configs/fast/30s.yaml
INCEPTION = CONV + 2 * CONV + 2 * CONV + "MaxPool2d " + CONV
GOOGLENET = (
    (CONV + "MaxPool2d ")
    + "Conv2d Conv2d MaxPool2d "  # the tutorial has no ReLU here
    + (2 * INCEPTION + "MaxPool2d ")
    + (5 * INCEPTION + "MaxPool2d ")
    + (2 * INCEPTION + "AdaptiveAvgPool2d Flatten Linear")
)
ALEXNET = 2 * (CONV + "MaxPool2d ") + 3 * CONV + "MaxPool2d Flatten "
LENET = 2 * (CONV + "MaxPool2d ") + "Flatten Linear ReLU Linear ReLU Linear"
LAYERS = [
    (LeNet, {}, LENET),
    (LeNet, {"activation": "sigmoid"}, LENET.replace("ReLU", "Sigmoid")),
    (LeNet, {"pooling": "average"}, LENET.replace("MaxPool2d", "AvgPool2d")),
    (AlexNet, {}, ALEXNET + HIDDEN + "Linear"),
    (AlexNet, {"hidden_layers": 2}, ALEXNET + 2 * HIDDEN + "Linear"),
    (VGG, {}, 2 * (CONV + "MaxPool2d ") + 3 * (2 * CONV + "MaxPool2d ") + "Flatten " + 2 * HIDDEN + "Linear"),
    (VGG, {"blocks": 1}, CONV + "MaxPool2d Flatten " + 2 * HIDDEN + "Linear"),
    (VGG, {"depth": 13, "blocks": 2, **SHORT}, 2 * ("Conv2d MaxPool2d BatchNorm2d ReLU " + NORMED) + "Flatten Linear"),
    (NiN, {}, 3 * (3 * CONV + "MaxPool2d ") + "Dropout " + 3 * CONV + "AdaptiveAvgPool2d Flatten"),
    (GoogLeNet, {}, GOOGLENET),
    (GoogLeNet, {"batch_norm": True}, GOOGLENET.replace("Conv2d", "Conv2d BatchNorm2d")),
]

# Every network and every switch at a size that costs little: (network, arguments, image size)
LIGHT = [
    (LeNet, {}, 28),
    (LeNet, {"activation": "sigmoid", "pooling": "average", "padding": 0}, 28),
    (AlexNet, {"image_size": 67}, 67),
    (AlexNet, {"image_size": 67, "hidden_layers": 2}, 67),
    (AlexNet, {"image_size": 67, "width_divisor": 32}, 67),
    *[
        (VGG, {"depth": depth, "width_divisor": 8, "image_size": 64, "batch_norm": batch_norm}, 64)
        for depth in (11, 13, 16, 19)
        for batch_norm in (False, True)
    ],
    (VGG, {"depth": 16, "width_divisor": 4, "image_size": 28, "blocks": 3, **SHORT}, 28),
    (NiN, {}, 67),
    (GoogLeNet, {}, 64),
    (GoogLeNet, {"batch_norm": True}, 64),
]


def name(value: object) -> str | None:
    """Name a test after its network and its arguments."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return ",".join(f"{key}={value[key]}" for key in value) or "default"
    return None


@pytest.mark.parametrize(("network", "arguments", "size", "parameters", "gigaflops"), PUBLISHED, ids=name)
def test_parameters_and_flops_are_the_published_ones(network, arguments, size, parameters, gigaflops):
    with torch.device("meta"):
        net = network(**arguments)
        images = torch.empty(1, 1, size, size)
    with FlopCounterMode(display=False) as flops:
        logits = net(images)
    assert logits.shape == (1, 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    if gigaflops is not None:
        assert round(flops.get_total_flops() / 1e9, 3) == gigaflops


@pytest.mark.parametrize(("network", "arguments", "size", "expected"), STAGES, ids=name)
def test_children_print_as_the_tutorials_stages(network, arguments, size, expected):
    with torch.device("meta"):
        net = network(**arguments)
        images = torch.empty(2, 1, size, size)
    outputs = []
    for child in net.children():
        for stage in child if isinstance(child, nn.Sequential) else [child]:
            stage.register_forward_hook(
                lambda module, inputs, output: outputs.append("x".join(map(str, output.shape[1:])))
            )
    net(images)
    assert [output for output, _ in groupby(outputs)] == expected.split()


@pytest.mark.parametrize(("network", "arguments", "expected"), LAYERS, ids=name)
def test_layers_stand_in_the_published_order(network, arguments, expected):
    with torch.device("meta"):
        leaves = [module for module in network(**arguments).modules() if not list(module.children())]
    assert [type(module).__name__ for module in leaves] == expected.split()


def test_inception_concatenates_its_four_branches():
    torch.manual_seed(0)
    block = Inception(8, 2, (3, 4), (5, 6), 7)
    maps = torch.randn(2, 8, 9, 9)
    parameters = list(block.parameters())
    (w1, b1), (w3a, b3a), (w3b, b3b), (w5a, b5a), (w5b, b5b), (wp, bp) = zip(
        parameters[::2], parameters[1::2], strict=True
    )
    branches = [
        F.conv2d(maps, w1, b1).relu(),
        F.conv2d(F.conv2d(maps, w3a, b3a).relu(), w3b, b3b, padding=1).relu(),
        F.conv2d(F.conv2d(maps, w5a, b5a).relu(), w5b, b5b, padding=2).relu(),
        F.conv2d(F.max_pool2d(maps, 3, stride=1, padding=1), wp, bp).relu(),
    ]
    assert w3b.shape[-1] == 3
    assert w5b.shape[-1] == 5
    torch.testing.assert_close(block(maps), torch.cat(branches, dim=1))


@pytest.mark.parametrize(
    ("network", "arguments", "layers"), [(AlexNet, {"hidden_layers": 2}, 2), (VGG, {}, 2), (NiN, {}, 1)], ids=name
)
def test_dropout_reaches_its_layers(network, arguments, layers):
    with torch.device("meta"):
        net = network(dropout=0.3, **arguments)
    assert [module.p for module in net.modules() if isinstance(module, nn.Dropout)] == [0.3] * layers


@pytest.mark.parametrize(
    ("network", "arguments", "size"),
    [
        (LeNet, {"image_size": 12}, 12),
        (LeNet, {"image_size": 33, "padding": 0}, 33),
        (LeNet, {"image_size": 1, "padding": 8}, 1),
        (AlexNet, {"image_size": 67}, 67),
        (AlexNet, {"image_size": 227}, 227),
        (VGG, {"image_size": 32}, 32),
        (VGG, {"image_size": 95, "depth": 19, "batch_norm": True}, 95),
        (NiN, {}, 67),
        (NiN, {}, 130),
        (GoogLeNet, {}, 1),
        (GoogLeNet, {}, 225),
    ],
    ids=name,
)
def test_other_sizes_channels_and_classes(network, arguments, size):
    with torch.device("meta"):
        net = network(in_channels=3, num_classes=7, **arguments)
        assert net(torch.empty(5, 3, size, size)).shape == (5, 7)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (LeNet, {"image_size": 11}, "image_size=11 is too small for LeNet: with padding=2 it needs at least 12 pixels"),
        (LeNet, {"image_size": 15, "padding": 0}, "with padding=0 it needs at least 16 pixels"),
        (LeNet, {"image_size": 0, "padding": 20}, "with padding=20 it needs at least 1 pixels"),
        (LeNet, {"padding": -1}, "padding=-1 is negative: it must be at least 0 pixels"),
        (LeNet, {"activation": "tanh"}, "activation='tanh' is unknown: use 'relu' or 'sigmoid'"),
        (LeNet, {"pooling": "mean"}, "pooling='mean' is unknown: use 'max' or 'average'"),
        (AlexNet, {"image_size": 66}, "image_size=66 is too small for AlexNet: it needs at least 67 pixels"),
        (AlexNet, {"image_size": -224}, "image_size=-224 is too small for AlexNet: it needs at least 67 pixels"),
        (AlexNet, {"hidden_layers": 3}, "hidden_layers=3 is not possible for AlexNet: use 1 or 2"),
        (AlexNet, {"width_divisor": 64}, "width_divisor=64 must divide 32: use 1, 2, 4, 8, 16 or 32"),
        (AlexNet, {"hidden_layers": 0}, "hidden_layers=0 is not possible for AlexNet: use 1 or 2"),
        (AlexNet, {"dropout": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
        (VGG, {"image_size": 31}, "image_size=31 is too small for VGG: it needs at least 32 pixels"),
        (VGG, {"image_size": 7, "blocks": 3}, "image_size=7 is too small for VGG: it needs at least 8 pixels"),
        (VGG, {"blocks": 0}, "blocks=0 must lie in 1 to 5"),
        (VGG, {"blocks": 6}, "blocks=6 must lie in 1 to 5"),
        (VGG, {"depth": 12}, "depth=12 is not a VGG: use 11, 13, 16 or 19"),
        (VGG, {"width_divisor": 0}, "width_divisor=0 must divide 64: use 1, 2, 4, 8, 16, 32 or 64"),
        (VGG, {"width_divisor": -8}, "width_divisor=-8 must divide 64: use 1, 2, 4, 8, 16, 32 or 64"),
        (VGG, {"width_divisor": 3}, "width_divisor=3 must divide 64: use 1, 2, 4, 8, 16, 32 or 64"),
        *[
            (network, counts, f"in_channels={channels} and num_classes={classes} must both be at least 1")
            for network in (LeNet, AlexNet, VGG, NiN, GoogLeNet)
            for channels, classes in ((0, 10), (1, -3))
            for counts in [{"in_channels": channels, "num_classes": classes}]
        ],
    ],
    ids=name,
)
def test_wrong_arguments_are_named_in_one_line(network, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=re.escape(message) + "$") as error:
        network(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("network", "least"), [(LeNet, 12), (AlexNet, 67), (VGG, 32), (NiN, 67)], ids=name)
def test_the_named_minimum_is_where_the_geometry_ends(network, least):
    """One pixel less leaves a pooling or a convolution without an output, so nothing usable is refused."""
    with torch.device("meta"):
        features = network().features
        assert min(features(torch.empty(1, 1, least, least)).shape[-2:]) >= 1
        with pytest.raises(RuntimeError, match=r"too small|can't be greater than"):
            features(torch.empty(1, 1, least - 1, least - 1))


@pytest.mark.parametrize("network", [LeNet, AlexNet, VGG], ids=name)
@pytest.mark.parametrize("shape", [(2, 1, 96, 96), (2, 3, 64, 64), (2, 1, 64, 96), (1, 64, 64)], ids=str)
def test_images_of_another_shape_are_refused(network, shape):
    with torch.device("meta"):
        net = network(image_size=64) if network is not AlexNet else network(image_size=67)
        expected = rf"images are \(C, H, W\)={re.escape(str(shape[1:]))}, this {network.__name__} was built for"
        with pytest.raises(ValueError, match=expected):
            net(torch.empty(shape))


@pytest.mark.parametrize("shape", [(2, 1, 66, 67), (2, 1, 224, 28)], ids=str)
def test_nin_refuses_images_that_are_too_small(shape):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=f"^{shape[2]}x{shape[3]} images .* at least 67x67 pixels$"),
    ):
        NiN()(torch.empty(shape))


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_equals_torchvision_given_the_same_weights(depth, batch_norm):
    """The full networks, but one set of weights for both (0.5 GB), drawn so that every layer's output matters."""
    suffix = "_bn" if batch_norm else ""
    with torch.device("meta"):
        ours = VGG(depth, batch_norm=batch_norm, in_channels=3)
        theirs = torchvision.models.get_model(f"vgg{depth}{suffix}", num_classes=10, init_weights=False)
    layout = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert layout == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert list(layout) == list(theirs.state_dict())

    torch.manual_seed(depth)
    weights = {}
    for key, shape in layout.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
        elif len(shape) > 1:  # He's bound, which keeps the activations' scale from layer to layer
            bound = (6 / shape[1:].numel()) ** 0.5
            weights[key] = torch.empty(shape).uniform_(-bound, bound)
        else:  # biases; means; batch normalisation's scales and variances, which must be positive
            weights[key] = (
                torch.empty(shape).uniform_(0.5, 1.5) if batch_norm else torch.empty(shape).uniform_(-0.5, 0.5)
            )
    images = torch.rand(1, 3, 224, 224)
    logits = []
    for net in (ours, theirs):
        net.load_state_dict(weights, assign=True)
        with torch.no_grad():
            logits.append(net.eval()(images))
    assert logits[0].std() > 0.01
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize(("network", "arguments", "size"), LIGHT, ids=name)
def test_every_parameter_gets_a_finite_gradient(network, arguments, size):
    torch.manual_seed(0)
    net = network(**arguments)
    loss = F.cross_entropy(net(torch.rand(4, 1, size, size)), torch.tensor([0, 3, 6, 9]))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        assert parameter.grad.isfinite().all(), f"{key} has a gradient that is not finite"
        assert parameter.grad.any(), f"{key} has a gradient of zeros"


@pytest.mark.parametrize(("network", "arguments", "size"), LIGHT, ids=name)
def test_a_single_image_and_channels_last_give_the_same_logits(network, arguments, size):
    torch.manual_seed(0)
    net = network(**arguments).eval()
    images = torch.rand(3, 1, size, size)
    with torch.no_grad():
        logits = net(images)
        single = net(images[:1])
        net = net.to(memory_format=torch.channels_last)
        channels_last = net(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(single, logits[:1])
    torch.testing.assert_close(channels_last, logits)


@pytest.mark.parametrize(
    ("network", "arguments", "size"),
    [
        (LeNet, {}, 28),
        (AlexNet, {"image_size": 67}, 67),
        (VGG, {"width_divisor": 16, "image_size": 32, "batch_norm": True}, 32),
        (NiN, {}, 67),
        (GoogLeNet, {}, 32),
    ],
    ids=name,
)
def test_export_and_compile_keep_the_logits(network, arguments, size):
    torch.manual_seed(0)
    net = network(**arguments).eval()
    images = torch.rand(3, 1, size, size)
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    # "eager" traces as every backend does, without the minutes a compiler takes; fullgraph forbids a graph break.
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images[:2]), net(images[:2]))
        torch.testing.assert_close(compiled(images), net(images))
