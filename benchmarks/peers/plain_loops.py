"""The loops that train.py is compared with, each written from scratch; each is a contestant (see side_by_side.py).

Run by throughput.py: `python -m benchmarks.peers.plain_loops LOOP --model RECIPE ...`.
"""

import argparse
import contextlib
import os
import pydoc
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.harness.side_by_side import Turns
from cli.recipes import read_recipe
from datamodules.files.finding import load, prepare

WORKERS = min(4, os.cpu_count() or 1)  # the tutorials' 4, or as many as there are cores


class PictureDataset(Dataset):
    """One PIL image and label at a time, as torchvision's FashionMNIST gives them; `part` is train or test."""

    def __init__(self, data_dir: Path, transform: Callable[..., Tensor] | None, part: Any = "train") -> None:
        self.images, self.labels = load(prepare(data_dir), part)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index].numpy(), mode=None)
        return self.transform(image) if self.transform else image, int(self.labels[index])


def ours(model: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a recipe, and the recipe."""
    recipe = read_recipe(model)
    net = recipe["model"]["net"]
    return pydoc.locate(net["class_path"])(**net.get("init_args", {})), recipe  # type: ignore[operator]


def build(model: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a recipe, without this project's settings, and the recipe."""
    network, recipe = ours(model)
    for layer in network.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # as in the tutorials' layers, and PyTorch's default
    return network, recipe


def endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def _usual(
    options: argparse.Namespace, steps: list[Any], resize_always: bool = True, pin_memory: bool = False
) -> tuple[nn.Module, DataLoader, torch.optim.Optimizer]:
    """The recipe's network, a loader of PIL images that are resized and then go through the steps, and plain Adam."""
    net, recipe = build(options.model)
    net, size = net.to(options.device), recipe["data"]["image_size"]
    resize = [transforms.Resize(size)] if resize_always or size != 28 else []
    data = PictureDataset(options.data_dir, transforms.Compose([*resize, *steps]))
    batch_size = options.batch_size or recipe["data"]["batch_size"]
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=options.workers, pin_memory=pin_memory)
    return net, loader, torch.optim.Adam(net.parameters(), lr=recipe["model"]["optimizer"]["init_args"]["lr"])


def tutorial(options: argparse.Namespace, turns: Turns) -> None:
    """The loop of Dive into Deep Learning, PyTorch edition (section 3.6 and 5.5): plain fp32, `.item()` each step."""
    net, loader, optimizer = _usual(options, [transforms.ToTensor()], resize_always=False)
    loss_function = nn.CrossEntropyLoss()
    loss_sum = accuracy_sum = 0.0
    turns.wait()
    for images, labels in endless(loader):
        images, labels = images.to(options.device), labels.to(options.device)
        logits = net(images)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.cpu().item()
        accuracy_sum += (logits.argmax(dim=1) == labels).sum().cpu().item()
        turns.step(len(labels))


def references(options: argparse.Namespace, turns: Turns) -> None:
    """In the style of torchvision's references/classification: smoothed meters of loss, top-1 and top-5 each step.

    `--fast` switches mixed precision on, as its `--amp` does.
    """
    steps = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float)]
    cuda = options.device == "cuda"
    net, loader, optimizer = _usual(options, [*steps, transforms.Normalize((0.286,), (0.353,))], pin_memory=cuda)
    loss_function = nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler(options.device) if cuda and options.fast else None
    meters: dict[str, list[float]] = {"loss": [], "acc1": [], "acc5": []}
    torch.backends.cudnn.benchmark = True
    turns.wait()
    for images, labels in endless(loader):
        images, labels = images.to(options.device), labels.to(options.device)
        with torch.amp.autocast(options.device, enabled=scaler is not None):
            logits = net(images)
            loss = loss_function(logits, labels)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        with torch.inference_mode():
            hits = logits.topk(5).indices == labels[:, None]
            values = loss.item(), 100 * hits[:, 0].float().mean().item(), 100 * hits.float().sum(1).mean().item()
        for meter, value in zip(meters.values(), values, strict=True):
            meter.append(value)
        turns.step(len(labels))


def timm(options: argparse.Namespace, turns: Turns) -> None:
    """With timm's own network, loader and optimiser, as in its train.py with its fastest flags.

    On a GPU: --amp --amp-dtype bfloat16 --channels-last, its prefetcher, and a fused optimiser; on the CPU
    --channels-last.
    """
    try:
        from timm import create_model
        from timm.data import create_loader
        from timm.optim import create_optimizer_v2
        from timm.utils import AverageMeter
    except ImportError as error:
        turns.missing(f"timm is not installed (pip install timm): {error}")
    recipe = read_recipe(options.model)
    if not options.model.startswith("vgg"):
        turns.missing(f"timm has no {options.model} of this kind; only its vgg11 is compared")
    cuda = options.device == "cuda"
    size, batch_size = recipe["data"]["image_size"], options.batch_size or recipe["data"]["batch_size"]
    net = create_model("vgg11", in_chans=1, num_classes=10).to(options.device, memory_format=torch.channels_last)
    data = PictureDataset(options.data_dir, None)
    images = {"interpolation": "bilinear", "mean": (0.286,), "std": (0.353,), "no_aug": True}
    work = {"num_workers": options.workers, "use_prefetcher": cuda, "pin_memory": cuda}
    shape, device = (1, size, size), torch.device(options.device)
    loader = create_loader(data, shape, batch_size, is_training=True, device=device, **images, **work)
    lr = recipe["model"]["optimizer"]["init_args"]["lr"]
    optimizer = create_optimizer_v2(net, opt="adam", lr=lr, **({"fused": True} if cuda else {}))
    losses = AverageMeter()
    torch.backends.cudnn.benchmark = True
    turns.wait()
    for images, labels in endless(loader):
        images = images.to(options.device).contiguous(memory_format=torch.channels_last)
        labels = labels.to(options.device)
        with torch.amp.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if losses.count % (50 * len(labels)) == 0:  # it logs every 50 steps, and waits only then
            losses.update(loss.item(), len(labels))
        losses.count += len(labels)
        turns.step(len(labels))


def d2l(options: argparse.Namespace, turns: Turns) -> None:
    """d2l 1.0.3 itself: its FashionMNIST and its Trainer, with our network in its Classifier."""
    try:
        from d2l import torch as d2l_torch
    except ImportError as error:
        turns.missing(f"d2l is not installed (pip install d2l==1.0.3): {error}")
    net, recipe = build(options.model)
    size, batch_size = recipe["data"]["image_size"], options.batch_size or recipe["data"]["batch_size"]

    class Data(d2l_torch.FashionMNIST):
        def __init__(self) -> None:
            d2l_torch.DataModule.__init__(self, num_workers=options.workers)
            self.batch_size, self.resize = batch_size, (size, size)
            steps = transforms.Compose([transforms.Resize(self.resize), transforms.ToTensor()])
            self.train = PictureDataset(options.data_dir, steps)

        def train_dataloader(self) -> "_Counted":
            return _Counted(super().train_dataloader(), turns)

        def val_dataloader(self) -> None:
            """None: a turn is training alone."""

    class Model(d2l_torch.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.lr = net, recipe["model"]["optimizer"]["init_args"]["lr"]
            self.board.display = False  # it draws into a notebook; not part of the comparison

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    turns.wait()
    trainer = d2l_torch.Trainer(max_epochs=1000, num_gpus=int(options.device == "cuda"))
    trainer.fit(Model(), Data())


class _Counted:
    """A loader that reports, before it gives the next batch, that the step with the previous one is done."""

    def __init__(self, loader: DataLoader, turns: Turns) -> None:
        self._loader = loader
        self._turns = turns

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield batch
            self._turns.step(len(batch[-1]))


def matmul(options: argparse.Namespace, turns: Turns) -> None:
    """Floating-point operations a second of one large matrix product: the machine's peak in practice.

    In bfloat16 on a GPU, and with `--fast` on the CPU; in float32 there otherwise.
    """
    half = options.device == "cuda" or options.fast
    multiply, operations = matrix_product(options.device, torch.bfloat16 if half else torch.float32)
    turns.wait()
    while True:
        multiply()
        turns.step(operations)


def matrix_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A large matrix product, ready to be called, and its floating-point operations.

    On the CPU with whichever of PyTorch's two libraries is faster here: on some processors torch.mm's is half as
    fast as the convolutions' one.
    """
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    products: list[Callable[[], Any]] = [lambda: torch.mm(left, right, out=product)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        packed = left.to_mkldnn(), right.to_mkldnn()
        products.append(lambda: F.linear(*packed))
        products.sort(key=lambda multiply: min(timeit.repeat(multiply, number=1, repeat=3)))
    return products[0], 2 * size**3


class Steps(Turns):
    """No turns: the process ends after so many steps, and is timed from outside."""

    def __init__(self, steps: int) -> None:  # without reports
        self._left = steps

    def wait(self) -> None:
        """Nobody is waited for."""

    def step(self, amount: float) -> None:
        """Count the step."""
        self._left -= 1
        if not self._left:
            os._exit(0)  # the loader's workers may take five seconds to end


LOOPS = {loop.__name__: loop for loop in (tutorial, d2l, timm, references, matmul)}


def main() -> None:
    """Run one loop until the contest is over."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--steps", type=int, help="end after so many, instead of taking turns")
    options = parser.parse_args()
    torch.manual_seed(0)
    LOOPS[options.loop](options, Steps(options.steps) if options.steps else Turns(options.device))


if __name__ == "__main__":
    main()
