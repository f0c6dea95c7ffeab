"""How often NiN and GoogLeNet stay at chance: with the tutorial's initialisation, and with our recipes.

Each run is `train.py` itself on smaller images: everything else is as in the first batches of the whole training. A run
that has left chance (accuracy above 15 %) after `--batches` batches ends, any other continues, for at most `--rounds`
rounds, and then counts as collapsed. The reasons are recorded too: gradients, dead channels and logits, and layer by
layer how much of the signal depends on the image. Finished seeds are skipped; runs with settings other than today's
are replaced.

Command: python -m benchmarks.collapse --data_dir DIR
"""

import argparse
import io
import json
import math
import statistics
import sys
import time
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import print_table
from benchmarks.peers.plain_loops import build
from cli.recipes import read_recipe
from datamodules import FashionMNISTDataModule
from errors import run_program
from lit_modules import LitClassifier

CHANCE = 0.15  # validation accuracy up to which ten classes count as guessed
VAL_BATCHES = 8  # of the recipe's size


# The reduced size in pixels, and the module whose ReLUs are watched.
NETWORKS = {"nin": (67, "features.7"), "googlenet": (32, "features.stage5.1")}
TUTORIAL = ["--model.initialization", "default", "--model.scheduler", "null"]
SGD = ["--model.optimizer", "torch.optim.SGD", "--lr", "0.1"]
VARIANTS = {
    "tutorial": TUTORIAL,
    "recipe": [],
    "he only": ["--model.initialization", "he", "--model.output_bias", "null", "--model.scheduler", "null"],
    "tutorial, SGD 0.1": [*TUTORIAL, *SGD],  # the optimiser of the published runs that collapsed
    "tutorial, bf16": [*TUTORIAL, "--precision", "bf16-mixed"],  # train.py's default where the device has bfloat16
    "recipe, bf16": ["--precision", "bf16-mixed"],
}


class Watch(Callback):
    """Watches one run, ends it when it has left chance, and writes down what it saw.

    Args:
        block: Name of the network's module whose ReLUs are watched.
        out: JSON file to write.
    """

    def __init__(self, block: str, out: str) -> None:
        self._block = block
        self._out = Path(out)
        self._seen: dict[str, Any] = {"rounds": []}
        self._alive: dict[str, Tensor] = {}
        self._logits: list[Tensor] = []
        self._hooks: list[Any] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the very first gradient of the first layer."""
        if "first_gradient_norm" not in self._seen:
            net: Any = pl_module.net
            self._seen["first_gradient_norm"] = next(net.parameters()).grad.norm().item()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the ReLUs of the last block, and the logits."""
        self._alive, self._logits = {}, []
        net: Any = pl_module.net
        for name, layer in net.get_submodule(self._block).named_modules():
            if isinstance(layer, nn.ReLU):

                def note(_layer: nn.Module, _inputs: Any, maps: Tensor, name: str = name) -> None:
                    active = (maps > 0).any(dim=3).any(dim=2).any(dim=0)
                    self._alive[name] = self._alive[name] | active if name in self._alive else active

                self._hooks.append(layer.register_forward_hook(note))
        self._hooks.append(net.register_forward_hook(lambda _net, _in, logits: self._logits.append(logits)))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what is dead: channels that are zero, and logits that are the same, for every validation image."""
        while self._hooks:
            self._hooks.pop().remove()
        logits = torch.cat(self._logits)
        alive = torch.cat(list(self._alive.values()))
        self._dead = {
            "dead_channels": 1 - alive.float().mean().item(),
            "dead_logits": int((logits == logits[0]).all(dim=0).sum()),
            "predicted_classes": len(logits.argmax(dim=1).unique()),
        }

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A round is over: end the run unless it is still at chance."""
        names = ("val/accuracy", "val/loss", "train/loss")
        measured = {name: trainer.callback_metrics[name].item() for name in names}
        self._seen["rounds"].append(measured | self._dead)
        self._out.write_text(json.dumps(self._seen), encoding="utf-8")
        trainer.should_stop = measured["val/accuracy"] > CHANCE


def flags(name: str, variant: str, image_size: int, options: argparse.Namespace) -> list[str]:
    """The arguments of train.py, apart from seed and folders."""
    recipe = read_recipe(name)
    model = recipe["model"]
    asked = list(VARIANTS[variant])
    if variant.startswith("recipe") and model.get("scheduler"):
        # The schedule is that of the whole training; a run is only its beginning.
        batches = math.ceil((60_000 - options.val_size) / recipe["data"]["batch_size"])
        steps = recipe["trainer"]["max_epochs"] * batches
        asked += ["--model.scheduler.total_steps", str(steps)]
    settings: dict[str, Any] = {
        "--model": name,
        "--image_size": image_size,
        "--val_size": options.val_size,
        "--precision": 32,
        "--max_epochs": options.rounds,
        "--trainer.limit_train_batches": options.batches,
        "--trainer.limit_val_batches": VAL_BATCHES,
    }
    return [*(str(word) for flag, value in settings.items() if flag not in asked for word in (flag, value)), *asked]


def run(name: str, seed: int, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run of train.py in this process; returns how it ended."""
    import train

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out = Path(folder) / "seen.json"
        watch = ["--trainer.callbacks+=benchmarks.collapse.Watch", f"--trainer.callbacks.block={NETWORKS[name][1]}"]
        where = ["--seed", str(seed), *options.single, "--log_dir", folder, *watch]
        sys.argv[1:] = ["fit", *arguments, *where, f"--trainer.callbacks.out={out}"]
        start = time.monotonic()
        with redirect_stdout(io.StringIO()):
            code = train.main(sys.argv[1:])
        if code:
            raise RuntimeError(f"train.py {' '.join(sys.argv[1:])} ended with {code}")
        seen = json.loads(out.read_text(encoding="utf-8"))
    rounds = seen["rounds"]
    collapsed = rounds[-1]["val/accuracy"] <= CHANCE
    return {"seed": seed, "collapsed": collapsed, "seconds": time.monotonic() - start} | seen


@torch.no_grad()
def signal(name: str, initialization: Any, image_size: int, images: Tensor) -> dict[str, Any]:
    """How much of each layer's output depends on the image, in a network that has not been trained.

    Args:
        name: Recipe.
        initialization: For LitClassifier.
        image_size: Pixels to which the images (N, 1, 28, 28) are resized.
        images: Pixels in 0..1.

    Returns:
        For each convolution and linear layer, in the order of the computation, before its ReLU: the root mean square of
        its outputs, and the deviation over the images of a channel's mean over all positions.
    """
    torch.manual_seed(0)
    net = LitClassifier(build(name)[0], initialization=initialization).net.eval()
    layers: list[dict[str, Any]] = []
    for layer_name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def note(_layer: nn.Module, _inputs: Any, maps: Tensor, layer_name: str = layer_name) -> None:
                means = maps.flatten(2).mean(dim=2) if maps.ndim == 4 else maps
                varying = (means - means.mean(dim=0)).square().mean().sqrt().item()
                layers.append({"layer": layer_name, "rms": maps.square().mean().sqrt().item(), "over_images": varying})

            layer.register_forward_hook(note)
    net(nn.functional.interpolate(images, (image_size, image_size), mode="bilinear"))
    return {"network": name, "initialization": initialization, "image_size": image_size, "layers": layers}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one variant in a few numbers."""
    ends = [one["rounds"][-1] for one in runs]
    return {
        "collapsed": sum(one["collapsed"] for one in runs),
        "of": len(runs),
        "mean_accuracy": statistics.mean(end["val/accuracy"] for end in ends),
        "least_accuracy": min(end["val/accuracy"] for end in ends),
        "mean_dead_channels": statistics.mean(end["dead_channels"] for end in ends),
        "runs_with_dead_logits": sum(end["dead_logits"] > 0 for end in ends),
        "mean_predicted_classes": statistics.mean(end["predicted_classes"] for end in ends),
        "median_first_gradient_norm": statistics.median(one["first_gradient_norm"] for one in runs),
    }


def main() -> None:
    """Train every seed of every variant that is not on record yet, and show all."""
    parser = side_by_side.Parser(__doc__, budget=3600)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["tutorial", "recipe"])
    parser.add_argument("--seeds", type=int, default=20, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=100, help="batches in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds at most (default: %(default)s)")
    parser.add_argument("--val_size", type=int, default=5000, help="images held out (default: %(default)s)")
    options = parser.parse_args()
    given, begun = sys.argv[1:], time.monotonic()
    measured = {"measured": side_by_side.occasion("collapse", options.place)}
    known = side_by_side.recorded("collapse", options) or {"variants": [], "signal": []}
    groups, signals = known["variants"], [one for one in known["signal"] if one["network"] not in options.networks]
    data = FashionMNISTDataModule(data_dir=options.data_dir, val_size=100)
    data.prepare_data()
    data.setup("fit")
    images = data.val_set.images[:32].float().reshape(-1, 1, 28, 28) / 255
    signals += [
        signal(name, initialization, size, images) | measured
        for name in options.networks
        for initialization in ("default", "he")
        for size in (read_recipe(name)["data"]["image_size"], NETWORKS[name][0])
    ]

    def write() -> Path:
        sys.argv[1:] = given  # recorded as the command
        kept = [group | summary(group["runs"]) for group in groups if group["runs"]]
        return side_by_side.write_record("collapse", options, {"variants": kept, "signal": signals})

    for seed, name, variant in product(range(options.seeds), options.networks, options.variants):
        if time.monotonic() - begun > options.seconds:
            break
        arguments = flags(name, variant, NETWORKS[name][0], options)
        group = _group(groups, name, variant, arguments)
        if any(one["seed"] == seed for one in group["runs"]):
            continue
        group["runs"].append(run(name, seed, arguments, options))
        group |= measured
        with redirect_stdout(io.StringIO()):
            write()
        _tell(name, variant, group["runs"][-1])
    _show(groups, signals)
    write()


def _group(groups: list[dict[str, Any]], name: str, variant: str, arguments: list[str]) -> dict[str, Any]:
    """The group of runs with these settings; one with other settings is dropped."""
    wanted = {"network": name, "variant": variant, "flags": " ".join(arguments), "recipe": read_recipe(name)}
    for group in groups:
        if all(group[key] == value for key, value in wanted.items()):
            return group
    groups[:] = [group for group in groups if (group["network"], group["variant"]) != (name, variant)]
    groups.append(wanted | {"runs": []})
    return groups[-1]


def _show(groups: list[dict[str, Any]], signals: list[dict[str, Any]]) -> None:
    rows: list[tuple[Any, ...]] = []
    for group in filter(lambda group: group["runs"], groups):
        shown = summary(group["runs"])
        dead = f"{100 * shown['mean_dead_channels']:.0f} %", shown["runs_with_dead_logits"]
        accuracies = f"{shown['mean_accuracy']:.3f}", f"{shown['least_accuracy']:.3f}"
        gradient, collapsed = f"{shown['median_first_gradient_norm']:.1e}", f"{shown['collapsed']} of {shown['of']}"
        rows.append((group["network"], group["variant"], collapsed, *accuracies, *dead, gradient))
    header = "network | variant | collapsed | mean accuracy | least | dead channels | runs with dead logits"
    print_table(f"{header} | first gradient", rows)
    print()
    rows = []
    for one in signals:
        sizes = [f"{one['layers'][-1][key]:.1e}" for key in ("rms", "over_images")]
        rows.append((one["network"], one["initialization"], one["image_size"], *sizes))
    print_table("network | initialisation | image size | rms of the last layer | over the images", rows)


def _tell(name: str, variant: str, one: dict[str, Any]) -> None:
    end = one["rounds"][-1]
    state = "collapsed" if one["collapsed"] else "fine"
    print(
        f"{name}, {variant}, seed {one['seed']}: {state}, accuracy {end['val/accuracy']:.3f}, "
        f"{100 * end['dead_channels']:.0f} % dead channels, {end['dead_logits']} dead logits, {one['seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.collapse", main))
