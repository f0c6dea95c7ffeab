"""The flags of `train.py`: what each stands for, which values it takes, and its line in `--help`."""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from cli.recipes import recipes
from errors import UserError, expanded

SUBCOMMANDS = {
    "fit": "train only",
    "validate": "measure a checkpoint on the validation images",
    "test": "measure a checkpoint on the 10,000 test images",
    "predict": "class probabilities of the test images as CSV, or of --images",
}

# As --data names them; the others are torchvision's, see datamodules/files/torchvision_sets.py.
DATA_SETS = (
    *("fashion_mnist", "mnist", "kmnist", "qmnist", "usps", "semeion", "svhn", "cifar10", "cifar100", "stl10"),
    *("eurosat", "gtsrb", "pcam", "imagenette", "food101", "flowers102", "dtd", "oxfordiiitpet", "fgvcaircraft"),
    *("country211", "renderedsst2", "caltech101", "caltech256", "sun397"),
    *("emnist", "emnist_letters", "emnist_digits", "emnist_byclass"),
)

# What pages and word processors make of "-" and "--".
DASHES = "‐‑‒–—―−﹣－"


def _integer(least: int, most: float = math.inf) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(r"[+-]?\d+", text) or not least <= int(text) <= most:
            raise ValueError(f"an integer {f'of at least {least}' if most == math.inf else f'from {least} to {most}'}")
        return text

    return check


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return check


_accelerator = _one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu")
_precision = _one_of("32", "bf16", "16", "64", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


def _devices(text: str) -> str:
    if not re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)*,?", text) or text == "0":
        raise ValueError("a number of at least 1, the devices' numbers like 0,1, or auto")
    return text


def _positive_number(text: str) -> str:
    try:
        valid = 0 < float(text) < math.inf
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("a positive number")
    return text


def _batch_size(text: str) -> str:
    return text if text == "auto" else _integer(1)(text)


def _learning_rate(text: str) -> str:
    return text if text == "auto" else _positive_number(text)


def _epochs(text: str) -> str:
    return text if text == "-1" else _integer(1)(text)


def _text(text: str) -> str:
    if not text:
        raise ValueError("a value")
    return text


def _path(text: str) -> str:
    if re.match(r"[A-Za-z][\w+.-]+://", text):
        raise ValueError("a path on this machine (download it first)")
    return expanded(_text(text))


def _output(text: str) -> str:
    path = _path(text)
    if not text.endswith((".csv", ".json", ".png")):
        raise ValueError("a file name that ends in .csv, .json or .png")
    return path


class Flag(NamedTuple):
    """One short flag: what it stands for, how its value is checked (None: it takes none), its line in `--help`."""

    target: str
    check: Callable[[str], str] | None
    metavar: str
    help: str

    def takes(self, word: str) -> bool:
        """Whether a word that follows is its value; what is only switched on may be given true or false."""
        return is_value(word) if self.check else self.target.endswith("=true") and word.lower() in ON_OR_OFF


FLAGS = {
    "--model": Flag("", _path, "RECIPE", "recipe to train (list below), or a path to a YAML file"),
    "--data": Flag("", _text, "NAME", "mnist, cifar10, ...: list below; or a folder of your own pictures"),
    "--accelerator": Flag("--trainer.accelerator", _accelerator, "NAME", "cpu, gpu, mps or auto (default: auto)"),
    "--devices": Flag("--trainer.devices", _devices, "N", "number of devices or processes, or auto"),
    "--num_nodes": Flag("--trainer.num_nodes", _integer(1), "N", "number of machines"),
    "--precision": Flag("--trainer.precision", _precision, "P", "32, bf16-mixed, ... (default: bf16-mixed if fast)"),
    "--max_epochs": Flag("--trainer.max_epochs", _epochs, "N", "passes over the training images"),
    "--batch_size": Flag("--data.batch_size", _batch_size, "N", "training images per step on each device, or auto"),
    "--lr": Flag(
        "--model.optimizer.init_args.lr",
        _learning_rate,
        "X",
        "learning rate, or auto: found by trial before training",
    ),
    "--image_size": Flag("--data.image_size", _integer(1), "N", "height and width of the images, in pixels"),
    "--val_size": Flag("--data.val_size", _integer(0), "N", "training images held out for validation"),
    "--seed": Flag("--seed_everything", _integer(0, 2**32 - 1), "N", "seed of all random numbers"),
    "--patience": Flag("--patience", _integer(1), "N", "stop after N epochs without a better validation accuracy"),
    "--data_dir": Flag("--data.data_dir", _path, "DIR", "folder of the data set (default: data)"),
    "--log_dir": Flag("--log_dir", _path, "DIR", "folder of the runs (default: logs)"),
    "--ckpt_path": Flag("--ckpt_path", _path, "PATH", "checkpoint to continue or measure; last: the newest run's"),
    "--config": Flag("", _path, "FILE", "YAML file whose settings override the recipe's"),
    "--histograms": Flag("--histograms=true", None, "", "TensorBoard: histograms of weights, gradient norms; slower"),
    "--stop_at_chance": Flag("--stop_at_chance=true", None, "", "stop a network that learns nothing in 500 batches"),
    "--class_weights": Flag("--class_weights=true", None, "", "count the rare classes' images more in the loss"),
    "--pretrained": Flag("--pretrained=true", None, "", "start VGG from ImageNet's weights; see pretrained/vgg16"),
    "--compile": Flag("--model.compile=true", None, "", "compile the network with torch.compile"),
    "--print_model": Flag("", None, "", "show the network's stages, shapes and cost, and stop"),
    "--trust_checkpoint": Flag("", None, "", "let a checkpoint name classes from outside this project"),
    "--print_config": Flag("--print_config", None, "", "show the resolved configuration, and stop"),
}
# Flags of `predict` only. The first and the third take several values.
PREDICT_FLAGS = {
    "--images": Flag("", _path, "PATH...", "pictures, and folders of them, to classify instead of the test images"),
    "--invert": Flag(
        "",
        _one_of("auto", "always", "never"),
        "WHEN",
        "turn dark on light into light on dark: auto (default), always or never",
    ),
    "--output": Flag("", _output, "FILE...", "files to write: .csv, .json, .png (contact sheet; default: in outputs/)"),
    "--sort": Flag("", _one_of("given", "unsure"), "ORDER", "given (default), or unsure: the doubtful first"),
    "--gradcam": Flag(
        "", None, "", "write heat maps (LayerCAM) of the pictures, or, without --images, of the worst mistakes"
    ),
}
# LightningCLI's own flags, passed through and checked there.
LONG_GROUPS = ("--trainer", "--model", "--data")
LONG_FLAGS = ("--seed_everything", "--weights_only")
ON_OR_OFF = ("true", "false")  # what a flag that needs no value may be given, to undo what a recipe says
# What LightningCLI, other programs and papers call a setting, and its flag here.
FULL_NAMES = {
    **dict.fromkeys(("learning_rate", "learning-rate", "optimizer.lr"), "--lr"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "--max_epochs"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "num_devices"), "--devices"),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "checkpoint", "ckpt", "weights"), "--ckpt_path"),
    **dict.fromkeys(("recipe", "arch", "net", "network", "name"), "--model"),
    **dict.fromkeys(("folder", "dataset"), "--data"),
    **dict.fromkeys(("workers", "num_workers"), "--data.num_workers"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "--model.scheduler"),
    **{name: f"--model.optimizer.{name}" for name in ("weight_decay", "momentum")},
    **{name: f"--model.{name}" for name in ("optimizer", "label_smoothing", "mixup", "cutmix")},
    **{name: f"--data.{name}" for name in ("split_seed", "random_erasing", "horizontal_flip", "crop_padding")},
    **{
        name: f"--trainer.{name}"
        for name in (
            *("callbacks", "logger", "strategy", "deterministic", "profiler", "fast_dev_run", "max_steps", "max_time"),
            *("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"),
            *("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches", "gradient_clip_val"),
            *("log_every_n_steps", "enable_progress_bar", "enable_checkpointing"),
            *("num_sanity_val_steps", "sync_batchnorm", "benchmark"),
        )
    },
}
# The network's image size always follows the data's; see launch/classifier_cli.py.
LINKED = {"--model.net.image_size": "--image_size", "--model.net.init_args.image_size": "--image_size"}


def help_text(predict: bool = False) -> str:
    """The screen that `--help` shows, or that of `predict --help`."""
    if predict:
        shared = ("--ckpt_path", "--trust_checkpoint", "--accelerator", "--devices", "--precision", "--data_dir")
        flags = PREDICT_FLAGS | {name: FLAGS[name] for name in shared}
        lines = ["usage: python train.py predict --ckpt_path PATH [--images PATH...] [flags]", ""]
        lines += ["Writes the class probabilities of the test images, or shows the classes of your own pictures.", ""]
        lines += [f"  {f'{name} {flag.metavar}':<20} {flag.help}" for name, flag in flags.items()]
        return "\n".join([*lines, "", "All other flags: python train.py --help and python train.py fit --help"])
    lines = ["usage: python train.py [fit|validate|test|predict] --model RECIPE [flags]", ""]
    lines += ["Trains a classic CNN on Fashion-MNIST, then tests it. With a subcommand it does only that:"]
    lines += [*(f"  {name:<20} {description}" for name, description in SUBCOMMANDS.items()), ""]
    lines += [f"  {f'{name} {flag.metavar}':<20} {flag.help}" for name, flag in FLAGS.items()]
    lines += ["", "recipes:"]
    names = recipes()
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        lines += textwrap.wrap(
            " ".join(inside), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
    lines += ["", "data sets (default: fashion_mnist), or a folder with a sub-folder of pictures for each class:"]
    lines += textwrap.wrap(" ".join(DATA_SETS), 100, initial_indent="  ", subsequent_indent="  ")
    lines += ["", "Your own pictures (--images PATH...): python train.py predict --help"]
    lines += ["Every other setting (--trainer.*, --model.*, --data.*): python train.py fit --help"]
    return "\n".join(lines)


def refuse_pasted_dashes(arguments: Iterable[str]) -> None:
    """Refuse flags whose hyphens a page has turned into dashes.

    Raises:
        UserError: With what to type.
    """
    for token in arguments:
        word = token.lstrip(DASHES + "-")
        if set(token[: len(token) - len(word)]) & set(DASHES):
            typed = f"{'-' if word[:1].isdigit() or word[:1] == '.' else '--'}{word}"
            raise UserError(f"{token} begins with a dash as pages print it, not with hyphens; type {typed}")


def take_flag(token: str, tokens: list[str], refused: Mapping[str, str]) -> list[str]:
    """A flag that another command passes on to train.py, with its value, which is removed from the front of the tokens.

    Raises:
        UserError: If it is one of the refused flags, each given with the reason.
    """
    name, has_value, _ = token.partition("=")
    if name in refused:
        raise UserError(f"{name} can't be given here: {refused[name]}")
    takes = FLAGS[name].takes if name in FLAGS else is_value
    if not has_value and tokens and takes(tokens[0]):
        return [token, tokens.pop(0)]
    return [token]


def is_value(token: str) -> bool:
    """Whether a word of the command line is a value, not a flag."""
    return not token.startswith("--")
