"""Whole runs of the command on the sample, and what they leave behind."""

import csv
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
import yaml
from commands import DATA, ENVIRONMENT, REPO, run, run_forked
from jsonargparse import ArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.command import recipes
from datamodules import CLASS_NAMES, FashionMNISTDataModule
from lit_modules import LitClassifier

LENET = ["--model", "lenet", "--data_dir", str(DATA), "--val_size", "200"]
FAST = ["--max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
NUMBER = r"(\d\.\d{4})"


def good(answer):
    """The output of a run that went well, which says nothing on standard error."""
    assert (answer.code, answer.err) == (0, ""), answer
    return answer.out


def config(*arguments, folder):
    return yaml.safe_load(good(run_forked(*arguments, "--print_config", folder=folder)))


def line_after(start, text):
    (rest,) = (line.removeprefix(start) for line in text.splitlines() if line.startswith(start))
    return rest


def record(folder):
    return json.loads((folder / "record.json").read_text())


# --- the session's run -----------------------------------------------------------------------------------------------


def test_a_normal_run_prints_no_warning(trained):
    assert trained.answer.err == ""


def test_one_line_an_epoch_in_a_pipe(trained):
    lines = [line for line in trained.answer.out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    measured = rf"loss {NUMBER} accuracy {NUMBER}"
    pattern = rf"epoch ./3  train {measured}  val {measured}  lr \S+  .* images/s  \S+ s"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert "\r" not in trained.answer.out
    assert "\x1b" not in trained.answer.out


def test_the_summary_names_what_a_user_needs_next(trained):
    summary = trained.answer.out.rpartition("\n\n")[2]
    assert re.search(rf"^Test on 500 images: accuracy {NUMBER}, loss {NUMBER}$", summary, re.MULTILINE)
    assert re.search(r"^Training: 3 epochs in \S+ s, \S+ images/s", summary, re.MULTILINE)
    checkpoint = line_after("Checkpoint: ", summary)
    assert (trained.start / checkpoint).resolve() == trained.best.resolve()
    logs = line_after("Logs: ", summary)
    assert (trained.start / logs).resolve() == trained.folder.resolve()
    assert f"python train.py predict --ckpt_path {checkpoint}" in summary


def test_the_run_learned_something(trained):
    found = record(trained.folder)
    assert found["epochs"][-1]["train/loss"] < found["epochs"][0]["train/loss"] < 2.4
    assert found["test"]["accuracy"] > 0.5  # chance is 0.1


def test_the_record(trained):
    found = record(trained.folder)
    assert found["recipe"] == "lenet"
    assert (found["train_images"], found["val_images"], found["test"]["images"]) == (1203, 297, 500)
    assert (found["devices"], found["batch_size"], found["image_size"], found["seed"]) == (1, 32, 28, 0)
    assert (found["parameters"], found["max_epochs"], found["precision"]) == (61_706, 3, "32-true")
    assert found["versions"]["torch"] == version("torch")
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2, 3]
    for epoch in found["epochs"]:
        assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "seconds"} <= epoch.keys()
        # 1,203 images in that time
        assert epoch["images_per_second"] == pytest.approx(1203 / epoch["seconds"])
    assert found["best_val_accuracy"] == max(epoch["val/accuracy"] for epoch in found["epochs"])
    assert found["fit_seconds"] >= sum(epoch["seconds"] for epoch in found["epochs"])


def test_record_and_output_agree(trained):
    found = record(trained.folder)
    for epoch in found["epochs"]:
        assert f"train loss {epoch['train/loss']:.4f} accuracy {epoch['train/accuracy']:.4f}" in trained.answer.out
        assert f"val loss {epoch['val/loss']:.4f} accuracy {epoch['val/accuracy']:.4f}" in trained.answer.out
    assert f"accuracy {found['test']['accuracy']:.4f}, loss {found['test']['loss']:.4f}" in trained.answer.out


def test_the_event_files(trained):
    events = EventAccumulator(str(trained.folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    found = record(trained.folder)
    for stage in ("train", "val"):
        for name in ("loss", "accuracy"):
            values = [event.value for event in events.Scalars(f"{stage}/{name}")]
            assert values == pytest.approx([epoch[f"{stage}/{name}"] for epoch in found["epochs"]])
    for name in ("loss", "accuracy"):
        assert [event.value for event in events.Scalars(f"test/{name}")] == pytest.approx([found["test"][name]])
    for name in ("images_per_second", "epoch_seconds"):
        assert len(events.Scalars(f"speed/{name}")) == 3
    assert [event.value for event in events.Scalars("best/val_accuracy")] == pytest.approx([found["best_val_accuracy"]])
    rate = next(tag for tag in tags if tag.startswith("lr"))
    rates = [event.value for event in events.Scalars(rate)]
    assert 0 < max(rates) <= 0.005
    assert rates[-1] < max(rates)  # the recipe's schedule ends low


def test_the_hparams_tab(trained):
    events = EventAccumulator(str(trained.folder))
    events.Reload()
    content = {tag: data for tag, data in events.summary_metadata.items() if data.plugin_data.plugin_name == "hparams"}
    text = b"".join(data.plugin_data.content for data in content.values())
    for name in (
        b"model.net",
        b"LeNet",
        b"model.optimizer.lr",
        b"data.batch_size",
        b"best/val_accuracy",
        b"test/accuracy",
    ):
        assert name in text


def test_the_configuration_lies_beside_the_run_and_in_the_checkpoints(trained):
    saved = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert saved["data"]["batch_size"] == 32
    assert saved["model"]["net"]["class_path"] == "models.lenet.LeNet"
    for name in ("best", "last"):
        content = torch.load(trained.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert content["recipe"] == "lenet"
        inside = yaml.safe_load(content["config"])
        assert inside["model"]["net"]["init_args"]["image_size"] == 28
        assert inside["data"] == saved["data"]


def test_best_is_the_best_epoch(trained):
    epochs = record(trained.folder)["epochs"]
    content = torch.load(trained.best, weights_only=True)
    best = max(epochs, key=lambda epoch: epoch["val/accuracy"])
    assert content["epoch"] + 1 == best["epoch"]
    last = torch.load(trained.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] + 1 == 3


# --- what a checkpoint is good for ------------------------------------------------------------------------------------


def test_test_needs_the_checkpoint_alone(trained, tmp_path):
    found = record(trained.folder)["test"]
    out = good(run_forked("test", "--ckpt_path", str(trained.best), folder=tmp_path))
    assert out == f"test on 500 images: accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}\n"


def test_validate_measures_the_images_held_out(trained, tmp_path):
    best = max(record(trained.folder)["epochs"], key=lambda epoch: epoch["val/accuracy"])
    out = good(run_forked("validate", f"--ckpt_path={trained.best}", folder=tmp_path))
    assert out == f"validate on 297 images: accuracy {best['val/accuracy']:.4f}, loss {best['val/loss']:.4f}\n"


def test_predict_writes_one_line_an_image(trained, tmp_path):
    path = tmp_path / "best.ckpt"  # outside the run's folder, so that the file lands in the working folder
    path.write_bytes(trained.best.read_bytes())
    out = good(run_forked("predict", f"--ckpt_path={path}", folder=tmp_path))
    assert out == "Wrote the class probabilities of 500 images to predictions.csv\n"
    with (tmp_path / "predictions.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["image", "label", "prediction", *CLASS_NAMES]
    assert [int(line[0]) for line in lines] == list(range(500))
    for line in lines:
        probabilities = [float(text) for text in line[3:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert CLASS_NAMES[probabilities.index(max(probabilities))] == line[2]
    accuracy = sum(line[1] == line[2] for line in lines) / 500
    assert accuracy == pytest.approx(record(trained.folder)["test"]["accuracy"])


def test_image_size_and_normalisation_come_from_the_checkpoint(tmp_path):
    flags = ["--image_size=40", "--data.mean=0.3", "--data.std=0.35", "--max_epochs=1", "--batch_size=50"]
    good(run_forked(*LENET, *flags, folder=tmp_path))
    folder = tmp_path / "logs" / "lenet" / "version_0"
    found = record(folder)
    expected = f"test on 500 images: accuracy {found['test']['accuracy']:.4f}, loss {found['test']['loss']:.4f}\n"
    checkpoint = f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"
    assert found["image_size"] == 40
    assert good(run_forked("test", checkpoint, folder=tmp_path)) == expected
    assert good(run_forked("test", checkpoint, "--data.mean=0", folder=tmp_path)) != expected


def test_last_continues_in_the_same_folder(tmp_path):
    flags = ["fit", "--model=lenet_classic", f"--data_dir={DATA}", "--val_size=200"]
    good(run_forked(*flags, "--max_epochs=1", folder=tmp_path))
    first = record(tmp_path / "logs" / "lenet_classic" / "version_0")
    good(run_forked(*flags, "--max_epochs=3", "--ckpt_path=last", folder=tmp_path))
    good(run_forked(*flags, "--max_epochs=3", "--log_dir=straight", folder=tmp_path))
    runs = list((tmp_path / "logs" / "lenet_classic").iterdir())
    assert [path.name for path in runs] == ["version_0"]
    continued, straight = record(runs[0]), record(tmp_path / "straight" / "lenet_classic" / "version_0")
    assert [epoch["epoch"] for epoch in continued["epochs"]] == [1, 2, 3]
    assert continued["epochs"][0] == first["epochs"][0]
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):  # as if it had never stopped
        assert [epoch[name] for epoch in continued["epochs"]] == [epoch[name] for epoch in straight["epochs"]]


# --- the command's forms ----------------------------------------------------------------------------------------------


def test_fit_alone_does_not_test(tmp_path):
    out = good(run_forked("fit", *LENET, *FAST, folder=tmp_path))
    assert "Test on" not in out
    assert "test" not in record(tmp_path / "logs" / "lenet" / "version_0")


def test_from_another_folder_with_a_relative_path(tmp_path):
    """As a user would type it, from anywhere."""
    command = [sys.executable, os.path.relpath(REPO / "train.py", tmp_path), *LENET, *FAST]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "logs" / "lenet" / "version_0" / "record.json").is_file()


def test_config_before_and_after_the_subcommand(tmp_path):
    path = str(REPO / "configs" / "lenet.yaml")
    before = config("--config", path, "fit", "--lr=0.5", folder=tmp_path)
    after = config("fit", "--lr=0.5", "--config", path, folder=tmp_path)
    assert before == after == config("fit", "--model=lenet", "--lr=0.5", folder=tmp_path)
    assert after["model"]["optimizer"]["init_args"]["lr"] == 0.5


def test_a_config_sectioned_by_subcommand(tmp_path):
    content = yaml.safe_load((REPO / "configs" / "lenet.yaml").read_text())
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"fit": content | {"data": {"batch_size": 77}}}))
    found = config("--config", "all.yaml", "fit", folder=tmp_path)
    assert found["data"]["batch_size"] == 77
    assert found["model"] == config("fit", "--model=lenet", folder=tmp_path)["model"]


def test_flags_win_over_files_in_whatever_order(tmp_path):
    (tmp_path / "over.yaml").write_text("data: {batch_size: 7}\ntrainer: {max_epochs: 7}\n")
    for words in (
        "--batch_size=5 --config=over.yaml --model=lenet",
        "--model=lenet --config=over.yaml --data.batch_size 5",
        "--config=over.yaml --data.batch_size=5 --model=lenet",
    ):
        found = config(*words.split(), folder=tmp_path)
        assert (found["data"]["batch_size"], found["trainer"]["max_epochs"]) == (5, 7)


@pytest.mark.parametrize(
    "words", ["--lr=0.5 --model.optimizer=torch.optim.SGD", "--model.optimizer=torch.optim.SGD --lr=0.5"]
)
def test_a_rate_survives_a_change_of_optimizer(words, tmp_path):
    found = config("--model=lenet", *words.split(), folder=tmp_path)["model"]["optimizer"]
    assert found["class_path"] == "torch.optim.SGD"
    assert found["init_args"]["lr"] == 0.5


def test_print_config_round_trip(tmp_path):
    out = good(run_forked(*LENET, "--lr=0.03", "--image_size=32", "--print_config", folder=tmp_path))
    (tmp_path / "resolved.yaml").write_text(out)
    again = good(run_forked("--model=resolved.yaml", "--print_config", folder=tmp_path))
    assert yaml.safe_load(again) == yaml.safe_load(out)
    assert yaml.safe_load(out)["data"]["image_size"] == 32


def test_the_saved_configuration_trains_again(trained, tmp_path):
    good(run_forked("fit", "--config", str(trained.folder / "config.yaml"), "--log_dir=logs", folder=tmp_path))
    (folder,) = (tmp_path / "logs").glob("*/version_0")
    for again, first in zip(record(folder)["epochs"], record(trained.folder)["epochs"], strict=True):
        assert again["train/loss"] == first["train/loss"]
        assert again["val/accuracy"] == first["val/accuracy"]


def test_print_model_shows_the_stages_and_writes_nothing(tmp_path):
    out = good(run_forked("--model=alexnet", "--print_model", folder=tmp_path))
    assert re.search(r"^total +AlexNet +10 +29,983,434 +1,84\d,", out, re.MULTILINE)
    for shape in ("96x54x54", "256x12x12", "256x5x5", "4096"):
        assert shape in out
    assert list(tmp_path.iterdir()) == []


def test_fit_help_is_lightning_clis(tmp_path):
    out = good(run_forked("fit", "--help", folder=tmp_path))
    for flag in ("--trainer.max_epochs", "--model.optimizer", "--data.crop_padding", "--patience"):
        assert flag in out


def test_all_images_are_trained_on(tmp_path):
    good(run_forked("--model=lenet", f"--data_dir={DATA}", "--val_size=0", "--max_epochs=1", folder=tmp_path))
    folder = tmp_path / "logs" / "lenet" / "version_0"
    assert record(folder)["train_images"] == 1500
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_patience_stops_early(tmp_path):
    flags = ["--patience=1", "--max_epochs=9", "--model.optimizer=torch.optim.SGD", "--lr=1e-12"]
    good(run_forked("fit", *LENET, *flags, folder=tmp_path))
    assert len(record(tmp_path / "logs" / "lenet" / "version_0")["epochs"]) == 2


def test_the_same_seed_trains_the_same_network(tmp_path):
    losses: list[float] = []
    for seed in (3, 3, 4):
        good(run_forked("fit", *LENET, *FAST, f"--seed={seed}", f"--log_dir={seed}{len(losses)}", folder=tmp_path))
        losses.append(record(tmp_path / f"{seed}{len(losses)}" / "lenet" / "version_0")["epochs"][0]["train/loss"])
    assert losses[0] == losses[1] != losses[2]


# --- networks --------------------------------------------------------------------------------------------------------


OWN = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, hidden: int = 8, num_classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
"""


def test_a_network_of_the_users_own(tmp_path):
    (tmp_path / "my_networks.py").write_text(OWN)
    flags = [f"--data_dir={DATA}", "--val_size=200", "--max_epochs=2", "--model.net.hidden=16"]
    out = good(run("--model.net=my_networks.Tiny", *flags, folder=tmp_path))
    assert "Test on 500 images" in out
    (checkpoint,) = tmp_path.glob("logs/*/version_0/checkpoints/best.ckpt")
    refused = run_forked("test", f"--ckpt_path={checkpoint}", folder=tmp_path)
    assert refused.code == 2
    assert "add --trust_checkpoint if you know where the file comes from" in refused.err
    out = good(run_forked("test", f"--ckpt_path={checkpoint}", "--trust_checkpoint", folder=tmp_path))
    assert out.startswith("test on 500 images: accuracy")


def test_a_recipe_of_the_users_own(tmp_path):
    (tmp_path / "my_networks.py").write_text(OWN)
    (tmp_path / "mine.yaml").write_text(
        "model:\n  net: {class_path: my_networks.Tiny, init_args: {hidden: 12}}\n"
        f"data: {{data_dir: {DATA}, val_size: 100}}\ntrainer: {{max_epochs: 1}}\n"
    )
    good(run_forked("--model=mine.yaml", folder=tmp_path))
    assert record(tmp_path / "logs" / "mine" / "version_0")["parameters"] == 50 * 12 + 13 * 10


def test_a_network_of_torchvisions(tmp_path):
    flags = ["--model.net=torchvision.models.resnet18", "--model.net.num_classes=10", "--data.channels=3"]
    good(run_forked(*LENET, *flags, *FAST, "--batch_size=16", "--image_size=32", folder=tmp_path))
    folder = tmp_path / "logs" / "lenet" / "version_0"
    assert record(folder)["parameters"] == 11_181_642
    out = good(run_forked("test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}", folder=tmp_path))
    assert out.startswith("test on 500 images")


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_is_built(recipe):
    """Network, optimiser and schedule, as the YAML says; without memory for the weights."""
    content = yaml.safe_load(recipes()[recipe].read_text())
    assert f"--model {recipe}\n" in recipes()[recipe].read_text(), "the header gives the command"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LitClassifier, "model")
    parser.add_class_arguments(FashionMNISTDataModule, "data")
    settings = parser.parse_object({"model": content["model"], "data": content["data"]})
    if "image_size" in settings.model.net.init_args:
        settings.model.net.init_args.image_size = settings.data.image_size
    with torch.device("meta"):
        built = parser.instantiate(settings) if hasattr(parser, "instantiate") else parser.instantiate_classes(settings)
    images = torch.empty(2, *built.data.input_shape, device="meta")
    assert built.model.net(images).shape == (2, 10)
    optimizer = built.model.optimizer(built.model.parameters())
    assert optimizer.param_groups[0]["lr"] == content["model"]["optimizer"]["init_args"]["lr"]
    if built.model.scheduler:
        assert built.model.scheduler(optimizer, total_steps=10).optimizer is optimizer
    assert content["trainer"]["max_epochs"] > 0
    assert content["seed_everything"] == 0


# --- several processes -----------------------------------------------------------------------------------------------


EVALUATE = """
import sys
import lightning.pytorch as pl
import torch
from callbacks.processes import end_process
from datamodules import FashionMNISTDataModule
from lit_modules import LitClassifier
from models import VGG, LeNet

torch.manual_seed(0)
narrow = VGG(width_divisor=64, batch_norm=True, image_size=32)
with torch.no_grad():
    for _ in range(3):  # so that the statistics are not the ones of the start
        narrow(torch.rand(64, 1, 32, 32))
for net, size in ((LeNet(), 28), (narrow, 32)):
    data = FashionMNISTDataModule(sys.argv[1], eval_batch_size=60, image_size=size, val_size=203)
    trainer = pl.Trainer(
        accelerator="cpu", devices=int(sys.argv[2]), strategy="auto" if sys.argv[2] == "1" else "ddp",
        logger=False, enable_progress_bar=False, enable_checkpointing=False, use_distributed_sampler=False
    )
    for function in (trainer.test, trainer.validate):
        (found,) = function(LitClassifier(net), data, verbose=False)
        if trainer.is_global_zero:
            with open(sys.argv[3], "a") as file:
                print(trainer.world_size, file=file)
                for name, value in sorted(found.items()):
                    print(name, value.hex(), f"{value:.17g}", file=file)
end_process(0)  # as train.py ends
"""


def test_evaluation_is_the_same_with_one_two_and_three_processes(tmp_path):
    """500 test images in batches of 60, and 203 validation images: neither divides. All bits of the results agree."""
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    environment = ENVIRONMENT | {"PYTHONPATH": str(REPO)}

    def evaluate(devices):
        results = tmp_path / f"results-{devices}"
        command = [sys.executable, str(script), str(DATA), str(devices), str(results)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        lines = results.read_text().splitlines()
        assert [line for line in lines if line.isdigit()] == [str(devices)] * 4
        return [line for line in lines if not line.isdigit()]

    one, two, three = (evaluate(devices) for devices in (1, 2, 3))
    assert len(one) == 8
    assert one == two == three


def test_two_processes_train_and_test(trained, tmp_path):
    def train():
        flags = [*LENET, "--accelerator=cpu", "--devices=2", "--max_epochs=2", "--batch_size=50"]
        return run(*flags, folder=tmp_path, timeout=240)

    def test():
        return run("test", f"--ckpt_path={trained.best}", "--accelerator=cpu", "--devices=2", folder=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        training, testing = pool.submit(train).result(), pool.submit(test).result()
    out = good(training)
    found = record(tmp_path / "logs" / "lenet" / "version_0")
    assert (found["devices"], found["batch_size"]) == (2, 100)
    assert out.count("Test on 500 images") == 1
    assert len([line for line in out.splitlines() if line.startswith("epoch ")]) == 2
    expected = record(trained.folder)["test"]
    wanted = f"test on 500 images: accuracy {expected['accuracy']:.4f}, loss {expected['loss']:.4f}\n"
    assert good(testing).endswith(wanted)  # PyTorch 2.8 prints lines about its connections before it


# --- precision -------------------------------------------------------------------------------------------------------


def _no_bfloat16():
    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False


def _bfloat16():
    torch.cpu._is_avx512_bf16_supported = lambda: True


@pytest.mark.parametrize(
    ("cpu", "flags", "precision"),
    [
        (_bfloat16, [], "bf16-mixed"),
        (_no_bfloat16, [], "32-true"),
        (_no_bfloat16, ["--precision", "bf16-mixed"], "bf16-mixed"),
    ],
)
def test_a_recipe_in_bfloat16_runs_in_float32_where_the_cpu_only_imitates_it(tmp_path, cpu, flags, precision):
    recipe = tmp_path / "mine.yaml"
    text = (REPO / "configs" / "lenet.yaml").read_text()
    recipe.write_text(text.replace("trainer:", "trainer:\n  precision: bf16-mixed"))
    command = ["fit", *LENET[2:], *FAST, "--model", str(recipe), "--accelerator", "cpu", *flags]
    out = good(run_forked(*command, folder=tmp_path, prepare=cpu))
    assert f"precision {precision}" in out
    assert ("no bfloat16 instructions" in out) == (precision == "32-true")
    assert record(tmp_path / "logs" / "mine" / "version_0")["precision"] == precision


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_may_have_another_precision_than_float32(tmp_path, precision):
    fit = good(run_forked("fit", *LENET[2:], *FAST, "--model", "lenet", "--precision", precision, folder=tmp_path))
    checkpoint = tmp_path / "logs" / "lenet" / "version_0" / "checkpoints" / "last.ckpt"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]["net.classifier.5.weight"]
    assert weights.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert "61,706" in fit
