"""The course's exercises: what is checked in an answer, on the sample in tests/data."""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cli.recipes import PROJECT, UTF_8, load_yaml
from errors import UserError, printed_error

SAMPLE = PROJECT / "tests" / "data"
LIMIT = 60  # seconds, of a training by a recipe


class Finding(NamedTuple):
    """One finding: whether it is right, the name of its text in texts.yaml, and the values that the text mentions."""

    right: bool
    text: str
    values: Mapping[str, Any] = MappingProxyType({})


def numbers(**expected: float) -> Callable[[Any], Iterator[Finding]]:
    """The check of an answer that consists of numbers: whole ones exact, others within one per cent."""

    def check(answer: Any) -> Iterator[Finding]:
        for name, value in expected.items():
            given = getattr(answer, name)
            tolerance = 0.0 if isinstance(value, int) else 0.01
            right = isinstance(given, int | float) and math.isclose(given, value, rel_tol=tolerance)
            yield Finding(right, name, {"name": name, "given": given})

    return check


def lenet_2(answer: Any) -> Iterator[Finding]:
    """The padding of the first convolution is one too small."""
    from inspection.stages import stages
    from models import LeNet

    wanted, total = stages(LeNet(), (1, 28, 28))
    found, own_total = stages(answer.Answer(), (1, 28, 28))
    # A ReLU or a Flatten may be a layer of one's own network, or a line of its `forward`.
    pairs = list(zip(*([row for row in rows if row.parameters] for rows in (found, wanted)), strict=False))
    wrong = next(((own, row) for own, row in pairs if own.shape != row.shape), None)
    own, row = wrong or pairs[-1]
    yield Finding(not wrong, "shapes", {"stage": own.name, "given": by(own.shape), "wanted": by(row.shape)})
    counts = own_total.parameters, total.parameters
    yield Finding(counts[0] == counts[1], "parameters", {"given": f"{counts[0]:,}", "wanted": f"{counts[1]:,}"})


def lenet_3(answer: Any) -> Iterator[Finding]:
    """The network ends in a softmax, and cross entropy applies another."""
    import torch

    torch.manual_seed(0)  # so that an answer gets the same verdict every time
    net = answer.Answer()
    with torch.no_grad():
        sums = net(torch.rand(8, 1, 28, 28)).sum(dim=1)
    logits = not torch.allclose(sums, torch.ones(8), atol=1e-3)
    yield Finding(logits, "logits")
    if logits:
        accuracy = trained(net, epochs=4)
        yield Finding(accuracy > 0.65, "accuracy", {"accuracy": f"{accuracy:.2f}"})


def alexnet_2(answer: Any) -> Iterator[Finding]:
    """Each batch is normalised by its own mean and deviation."""
    import torch

    train, test = images("train")[0], images("test")[0]
    before = train.clone()
    seen = answer.prepare(train, train)
    shape = tuple(seen.shape) == (len(train), 1, 28, 28) and seen.dtype == torch.float32
    yield Finding(shape, "shape", {"given": f"{by(seen.shape)} {seen.dtype}"})
    mean, std = seen.float().mean().item(), seen.float().std().item()
    scaled = abs(mean) < 0.02 and abs(std - 1) < 0.02
    yield Finding(scaled, "scale", {"mean": f"{mean:.3f}", "std": f"{std:.3f}"})
    alone, together = answer.prepare(test[:1], train), answer.prepare(test, train)[:1]
    yield Finding(torch.allclose(alone, together, atol=1e-4), "alone")
    darker = test // 2  # so that nobody's statistics but those of the training images fit
    wanted = (darker[:, None].float() - train.float().mean()) / train.float().std()
    close = shape and torch.allclose(answer.prepare(darker, train), wanted, atol=0.02)
    yield Finding(close, "known")
    yield Finding(torch.equal(train, before), "unchanged")


def vgg_2(answer: Any) -> Iterator[Finding]:
    """A deep VGG that stays at chance."""
    net: dict[str, tuple[Any, ...]] = {
        "depth": (19,),
        "width_divisor": (8,),
        "blocks": (None, 5),
        "no_hidden_layers": (None, False),
    }
    ruled = {f"model.net.init_args.{name}": values for name, values in net.items()}
    ruled |= {"model.net.class_path": ("models.vgg.VGG",), "data.image_size": (32,), "trainer.max_epochs": (1, 2, 3)}
    kept = all(setting(answer, name) in values for name, values in ruled.items())
    yield Finding(kept, "kept")
    if not kept:
        return
    epoch = record(answer)["epochs"][-1]
    learnt = epoch["val/accuracy"] > 0.35
    yield Finding(learnt, "learns", {"accuracy": f"{epoch['val/accuracy']:.2f}", "loss": f"{epoch['train/loss']:.3f}"})


def vgg_3(answer: Any) -> Iterator[Finding]:
    """The test images are mixed with the training images."""
    import torch

    given = *images("train"), *images("test")
    train, val, test = (tuple(part) for part in answer.split(*given))
    untouched = all(torch.equal(own, official) for own, official in zip(test, given[2:], strict=True))
    yield Finding(untouched, "official", {"count": len(test[0])})
    known = {image.numpy().tobytes() for image in given[2]}
    leaked = sum(image.numpy().tobytes() in known for part in (train, val) for image in part[0])
    yield Finding(not leaked, "leaked", {"count": leaked})
    if leaked:
        return
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(*given[:2], strict=True)}
    held_out = {image.numpy().tobytes() for image in val[0]}
    shared = sum(image.numpy().tobytes() in held_out for image in train[0])
    yield Finding(not shared, "shared", {"count": shared})
    pairs = [(image.numpy().tobytes(), int(label)) for part in (train, val) for image, label in zip(*part, strict=True)]
    whole = len(pairs) == len(given[0]) and all(labels.get(image) == label for image, label in pairs)
    yield Finding(whole, "whole", {"count": len(pairs), "wanted": len(given[0])})
    yield Finding(len(val[1].unique()) == 10 and len(val[0]) >= 100, "classes", {"count": len(val[1].unique())})


def nin_1(answer: Any) -> Iterator[Finding]:
    """LeNet with NiN's ending instead of its linear layers."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = answer.Answer()
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    yield Finding(not linear, "linear", {"names": ", ".join(linear)})
    if linear:
        return
    shapes = [tuple(net.eval()(torch.rand(2, 1, size, size)).shape) for size in (28, 40)]
    yield Finding(shapes == [(2, 10), (2, 10)], "sizes", {"given": f"{by(shapes[0])}, {by(shapes[1])}"})
    if shapes != [(2, 10), (2, 10)]:
        return
    count = sum(parameter.numel() for parameter in net.parameters())
    yield Finding(count < 17_000, "parameters", {"given": f"{count:,}"})
    accuracy = trained(net.train(), epochs=6)
    yield Finding(accuracy > 0.5, "accuracy", {"accuracy": f"{accuracy:.2f}"})


def nin_2(answer: Any) -> Iterator[Finding]:
    """A recipe whose class maps are zero for every image."""
    import torch

    from lit_modules import LitClassifier
    from models import NiN

    kept = setting(answer, "model.net") in ("models.nin.NiN", {"class_path": "models.nin.NiN"})
    yield Finding(kept, "kept")
    if not kept:
        return
    torch.manual_seed(0)
    initialization, bias = (setting(answer, f"model.{name}") for name in ("initialization", "output_bias"))
    start: dict[str, Any] = {"initialization": initialization or "default"}  # another one train.py refuses below
    net = LitClassifier(NiN(), output_bias=bias if bias is None else float(bias), **start).net.eval()
    logits = net(torch.nn.functional.interpolate(images("test")[0][::25, None] / 255, (67, 67)))
    dead = int((logits == 0).all(dim=0).sum())
    yield Finding(not dead, "dead", {"count": dead})
    logits.logsumexp(dim=1).mean().backward()
    moving = any(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())
    yield Finding(moving, "gradient")
    if moving:
        flags = ["--image_size", "67", "--max_epochs", "1", "--batch_size", "32", "--trainer.limit_train_batches", "24"]
        flags += ["--precision", "32"]  # on every processor
        loss = record(answer, *flags)["epochs"][-1]["val/loss"]
        yield Finding(loss < 2.3, "loss", {"loss": f"{loss:.3f}"})


def googlenet_2(answer: Any) -> Iterator[Finding]:
    """An Inception block whose 5x5 convolution is two 3x3."""
    import torch

    from inspection.receptive_field import receptive_fields
    from models.googlenet import Inception

    own, known = answer.Answer(), Inception(192, 64, (96, 128), (16, 32), 32)
    given = tuple(own(torch.rand(1, 192, 12, 12)).shape)
    yield Finding(given == (1, 256, 12, 12), "shape", {"given": by(given)})
    net = torch.nn.Sequential(own)
    field = receptive_fields(net, (192, 12, 12)).get("0", 1)
    yield Finding(field == 5, "field", {"given": field})
    kernels = [max(module.kernel_size) for module in own.modules() if isinstance(module, torch.nn.Conv2d)]
    yield Finding(max(kernels) == 3, "kernel", {"given": max(kernels)})
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in (own, known)]
    yield Finding(counts[0] < counts[1], "parameters", {"given": f"{counts[0]:,}", "known": f"{counts[1]:,}"})


class Exercise(NamedTuple):
    """The kind of file that an answer is, and its check, which gets the file: loaded, if it is Python."""

    suffix: str
    check: Callable[[Any], Iterator[Finding]]


LENET = {"conv1_parameters": 156, "conv1_flops": 235_200, "conv2_parameters": 2_416, "conv2_flops": 480_000}
ALEXNET = {"smallest_image": 67, "image_for_55": 227, "receptive_field": 195, "share_of_first_linear": 0.8744}
VGG = {"three_3x3": 1_769_472, "one_7x7": 3_211_264, "receptive_field": 11, "largest_layer": 102_764_544}
GOOGLENET = {"direct_5x5": 153_632, "reduced_5x5": 15_920, "block_parameters": 163_696, "flops_factor": 5.444}
EXERCISES = {
    "lenet-1": Exercise(".py", numbers(**LENET)),
    "lenet-2": Exercise(".py", lenet_2),
    "lenet-3": Exercise(".py", lenet_3),
    "alexnet-1": Exercise(".py", numbers(**ALEXNET)),
    "alexnet-2": Exercise(".py", alexnet_2),
    "vgg-1": Exercise(".py", numbers(**VGG)),
    "vgg-2": Exercise(".yaml", vgg_2),
    "vgg-3": Exercise(".py", vgg_3),
    "nin-1": Exercise(".py", nin_1),
    "nin-2": Exercise(".yaml", nin_2),
    "googlenet-1": Exercise(".py", numbers(**GOOGLENET)),
    "googlenet-2": Exercise(".py", googlenet_2),
}


def by(shape: Any) -> str:
    """A shape as `6×28×28`."""
    return "×".join(map(str, shape))


def images(part: str) -> tuple[Any, Any]:
    """The sample's images (N, 28, 28) uint8 and labels (N,) int64."""
    from datamodules.files.finding import load

    return load(SAMPLE, "train" if part == "train" else "test")


def trained(net: Any, epochs: int) -> float:
    """The best validation accuracy of a network for 28x28 images in a short training on the sample."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from datamodules import FashionMNISTDataModule
    from lit_modules import LitClassifier

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    data = FashionMNISTDataModule(str(SAMPLE), batch_size=32, val_size=300)
    model = LitClassifier(net, optimizer=partial(torch.optim.AdamW, lr=0.003))
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    seen: list[float] = []
    note = LambdaCallback(
        on_validation_end=lambda trainer, _: seen.append(float(trainer.callback_metrics["val/accuracy"]))
    )
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, num_sanity_val_steps=0, callbacks=note, **off)  # type: ignore[arg-type]
    trainer.fit(model, data)
    return max(seen)


def record(recipe: Path, *flags: str) -> dict[str, Any]:
    """What train.py records of a training by a recipe on the sample.

    Raises:
        UserError: With its message, if train.py refuses the recipe.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROJECT / "train.py"), "fit", "--model", str(recipe.resolve()), *flags]
        command += ["--data_dir", str(SAMPLE), "--val_size", "300", "--accelerator", "cpu", "--devices", "1"]
        command += ["--log_dir", folder]
        try:
            how: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "timeout": LIMIT}
            done = subprocess.run(command, cwd=folder, env=os.environ | UTF_8, **how)
        except subprocess.TimeoutExpired:
            raise UserError(f"{recipe}: not trained after {LIMIT} s; fewer epochs or a smaller network?") from None
        if done.returncode:
            raise UserError(printed_error(done.stderr))
        return json.loads(next(Path(folder).rglob("record.json")).read_text(encoding="utf-8"))


def setting(recipe: Path, name: str) -> Any:
    """The value of a setting, like `data.image_size`; None where the recipe has none."""
    value: Any = load_yaml(recipe)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
