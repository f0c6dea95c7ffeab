"""Every mistake ends with one line on standard error and exit code 2; nothing is written. All processes are real."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import DATA, REPO, run, run_forked

from checkpoints.reading import read_checkpoint
from errors import UserError

# What the line must say, beside the command; {files} is a folder of broken files.
LIGHT = {
    "unknown recipe": ("--model alexnett", "unknown recipe 'alexnett'; did you mean alexnet?"),
    "no recipe": ("", "give --model RECIPE"),
    "recipe without its flag": ("alexnet", "did you mean --model alexnet?"),
    "two recipes": ("--model lenet --model nin", "two recipes, lenet and nin"),
    "recipe file that is missing": ("--model own.yaml", "the recipe file own.yaml does not exist"),
    "unknown subcommand": ("trian --model lenet", "unknown subcommand 'trian'"),
    "two subcommands": ("fit test --model lenet", "two subcommands, fit and test"),
    "misspelt flag": ("--model lenet --bath_size 3", "unknown flag --bath_size; did you mean --batch_size?"),
    "prefix of a flag": ("--model lenet --max_epoch 3", "unknown flag --max_epoch; did you mean --max_epochs?"),
    "flag without its value": ("--model lenet --lr", "--lr needs a value"),
    "value of a switch": ("--model lenet --compile=yes", "--compile takes no value"),
    "word for a number": ("--model lenet --max_epochs two", "--max_epochs must be an integer of at least 1, got 'two'"),
    "negative lr": ("--model lenet --lr -0.1", "--lr must be a positive number, got '-0.1'"),
    "NaN lr": ("--model lenet --lr nan", "--lr must be a positive number, got 'nan'"),
    "infinite lr": ("--model lenet --lr inf", "--lr must be a positive number, got 'inf'"),
    "batch size 0": ("--model lenet --batch_size 0", "--batch_size must be an integer of at least 1, got '0'"),
    "negative val size": ("--model lenet --val_size -1", "--val_size must be an integer of at least 0, got '-1'"),
    "large seed": ("--model lenet --seed 4294967296", "--seed must be an integer from 0 to 4294967295"),
    "devices": ("--model lenet --devices abc", "--devices must be a number of at least 1"),
    "precision": ("--model lenet --precision 7", "--precision must be one of 32, bf16"),
    "accelerator": ("--model lenet --accelerator tpuu", "--accelerator must be one of auto, cpu, gpu"),
    "linked setting": ("--model lenet --model.net.image_size 32", "set --image_size instead"),
    "missing YAML": ("--model lenet --config none.yaml", "none.yaml does not exist"),
    "folder for a YAML": ("--model lenet --config {files}", "is a folder; a YAML file was expected"),
    "empty YAML": ("--model lenet --config {files}/empty.yaml", "empty.yaml holds no settings"),
    "broken YAML": ("--model lenet --config {files}/broken.yaml", "broken.yaml is not valid YAML"),
    "list for a YAML": ("--model lenet --config {files}/list.yaml", "list.yaml holds no settings"),
    "bytes for a YAML": ("--model lenet --config {files}/bytes.yaml", "bytes.yaml can't be read as a YAML file"),
    "duplicate key": ("--model lenet --config {files}/twice.yaml", "'lr' stands twice, the second time in line 5"),
    "no run to continue": ("--model lenet --ckpt_path last", "there is no run of lenet to continue"),
    "last of what": ("fit --ckpt_path last", "--model RECIPE"),
    "nothing to test": ("test", "nothing to test: a network needs trained weights; give --ckpt_path PATH"),
}

HEAVY = {
    "prefix of a long flag": (
        "--trainer.max_epoch 3",
        "unknown flag --trainer.max_epoch; did you mean --trainer.max_epochs?",
    ),
    "misspelt group": ("--model.nett 3", "unknown flag --model.nett; did you mean --model.net?"),
    "misspelt argument": ("--model.net.paddin 1", "unknown setting model.net.paddin; did you mean padding?"),
    "argument of another class": ("--model.optimizer.momentum=1", "unknown setting model.optimizer.momentum"),
    "word for a long number": (
        "--trainer.max_epochs two",
        "trainer.max_epochs=two is not valid: an integer or null was expected",
    ),
    "word for a long lr": ("--model.optimizer.lr=fast", "model.optimizer.lr=fast is not valid: a number was expected"),
    "negative long lr": ("--model.optimizer.lr=-1", "learning rate: -1.0"),
    "NaN long lr": ("--model.optimizer.lr=.nan", "learning rate: nan"),
    "infinite weight decay": (
        "--model.optimizer.weight_decay=.inf",
        "optimizer weight_decay=inf must be a finite number",
    ),
    "negative weight decay": ("--model.optimizer.weight_decay=-1", "weight_decay value: -1.0"),
    "NaN mean": ("--data.mean nan", "data.mean=nan is not valid"),
    "choice": ("--model.net.activation tanh", "model.net.activation=tanh is not valid: relu or sigmoid was expected"),
    "long batch size 0": ("--data.batch_size 0", "data.batch_size=0 must be at least 1"),
    "long seed": ("--seed_everything -1", "seed_everything=-1 must lie between 0 and 4294967295"),
    "smoothing": ("--model.label_smoothing 1.5", "label_smoothing=1.5 must lie in [0, 1)"),
    "channels": ("--data.channels 2", "data.channels=2 must be 1 or 3"),
    "long devices": ("--trainer.accelerator cpu --trainer.devices abc", "devices"),
    "long precision": ("--trainer.precision 7", "trainer.precision=7 is not valid: 64, 32, 16"),
    "long accelerator": ("--trainer.accelerator tpuu", "invalid accelerator name"),
    "unknown key": (
        "--config {files}/unknown.yaml",
        "unknown.yaml: unknown setting trainer.max_epoch; did you mean trainer.max_epochs?",
    ),
    "unknown group": (
        "--config {files}/group.yaml",
        "group.yaml: unknown setting traner.max_epochs; did you mean trainer.max_epochs?",
    ),
    "unknown argument in YAML": (
        "--config {files}/argument.yaml",
        "argument.yaml: unknown setting model.net.init_args.pading; did you mean padding?",
    ),
    "word in YAML": (
        "--config {files}/word.yaml",
        "word.yaml: trainer.max_epochs=two is not valid: an integer or null was expected",
    ),
    "misspelt class": ("--model.net models.lenet.LeNett", "models.lenet has no LeNett; did you mean LeNet?"),
    "misspelt module": ("--model.net modles.lenet.LeNet", "there is no module modles"),
    "misspelt torchvision network": ("--model.net torchvision.models.resnet188", "did you mean resnet18?"),
    "misspelt optimizer": ("--model.optimizer torch.optim.Adm", "torch.optim has no Adm; did you mean Adam?"),
    "class that is no network": ("--model.net fractions.Fraction", "it is not a subclass of Module"),
    "network without its arguments": ("--model.net torch.nn.Linear", "it needs in_features, out_features"),
    "schedule without its argument": ("--model.scheduler torch.optim.lr_scheduler.OneCycleLR", "it needs max_lr"),
    "schedule that ignores --lr": (
        "--model.scheduler torch.optim.lr_scheduler.OneCycleLR --model.scheduler.max_lr 0.1 --lr 0.2",
        "--lr would change nothing; set --model.scheduler.init_args.max_lr",
    ),
    "image too small": ("--image_size 8", "image_size=8 is too small for LeNet: with padding=2 it needs at least 12"),
    "image too small, seen in forward": ("--model.net models.nin.NiN --image_size 66", "at least 67x67"),
    "image too small for torchvision's": (
        "--model.net torchvision.models.vgg11 --data.channels 3 --model.net.num_classes 10 --image_size 16",
        "VGG can't take images of 3x16x16",
    ),
    "wrong number of channels": ("--data.channels 3", "LeNet can't take images of 3x28x28"),
    "wrong number of logits": (
        "--model.net.num_classes 7",
        "outputs of shape (7,) for one image; 10 logits were expected",
    ),
    "output of wrong shape": ("--model.net torch.nn.Identity", "outputs of shape (1, 28, 28)"),
    "network that is not a whole one": (
        "--model.net torch.nn.Conv2d --model.net.in_channels 2 --model.net.out_channels 3 --model.net.kernel_size 3",
        "Conv2d can't take images of 1x28x28",
    ),
    "val size too large": ("--val_size 1500", "data.val_size=1500 leaves none of the 1500 training images"),
    "patience without validation": ("--val_size 0 --patience 2", "--patience needs validation images"),
    "file for a data folder": ("--data_dir {files}/empty.yaml", "empty.yaml is a file, but a folder is expected"),
    "file for a log folder": ("--log_dir {files}/empty.yaml/logs", "runs can't be written to"),
}
if not torch.cuda.is_available():
    HEAVY["no GPU"] = (
        "--accelerator cuda",
        "PyTorch finds no such device on this machine; use --accelerator cpu or auto",
    )

CHECKPOINTS = {
    "missing": ("none.ckpt", "does not exist"),
    "folder": ("", "is a folder; give the path of a .ckpt file"),
    "empty": ("empty.ckpt", "is empty"),
    "truncated": ("truncated.ckpt", "is damaged or is not a checkpoint"),
    "cut by a few bytes": ("cut.ckpt", "is damaged or is not a checkpoint"),
    "bit flipped in a tensor": ("flipped.ckpt", "is damaged: "),
    "text": ("text.ckpt", "is damaged or is not a checkpoint"),
    "another file of torch's": ("tensor.ckpt", "it holds no state_dict"),
    "malicious": ("malicious.ckpt", "holds objects that a checkpoint of this project never holds"),
    "malicious plain pickle": ("pickle.ckpt", "is damaged or is not a checkpoint"),
    "malicious class": (
        "class.ckpt",
        "names the class os.system, which this project, torch and torchvision do not have",
    ),
    "without its configuration": ("unexplained.ckpt", "does not say how it was trained; add --model RECIPE"),
    "without a weight": ("incomplete.ckpt", "net.classifier.5.bias is missing there"),
}


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained):
    """Broken files of every kind."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in {
        "empty": "",
        "broken": "trainer: {max_epochs: [3}",
        "list": "- trainer\n",
        "twice": "model:\n  optimizer:\n    init_args:\n      lr: 1\n      lr: 2\n",
        "unknown": "trainer: {max_epoch: 2}",
        "group": "traner: {max_epochs: 2}",
        "argument": "model: {net: {class_path: models.lenet.LeNet, init_args: {pading: 2}}}",
        "word": "trainer: {max_epochs: two}",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")

    good = trained.best.read_bytes()
    content = torch.load(trained.best, weights_only=True)
    payload = {"state_dict": {}, "config": Payload(folder / "executed")}
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for name, data in {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "cut": good[:-20],
        "flipped": bytes(flipped),
        "text": b"weights\n" * 100,
        "pickle": pickle.dumps(payload),
    }.items():
        (folder / f"{name}.ckpt").write_bytes(data)
    weights = {name: value for name, value in content["state_dict"].items() if name != "net.classifier.5.bias"}
    for name, saved in {
        "tensor": torch.zeros(3),
        "malicious": payload,
        "class": content | {"config": content["config"].replace("models.lenet.LeNet", "os.system")},
        "unexplained": {name: value for name, value in content.items() if name != "config"},
        "incomplete": content | {"state_dict": weights},
    }.items():
        torch.save(saved, folder / f"{name}.ckpt")
    return folder


def check(answer, folder, expected):
    lines = answer.err.splitlines()
    assert (len(lines), answer.code, answer.out) == (1, 2, ""), answer
    assert lines[0].startswith("train.py: error: ")
    assert expected in lines[0]
    assert len(lines[0]) < 300
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("case", LIGHT)
def test_light_mistakes(case, files, tmp_path):
    line, expected = LIGHT[case]
    check(run(*line.format(files=files).split(), folder=tmp_path), tmp_path, expected)


@pytest.mark.parametrize("case", HEAVY)
def test_heavy_mistakes(case, files, tmp_path):
    line, expected = HEAVY[case]
    line = f"--model lenet --data_dir {DATA} --val_size 200 {line.format(files=files)}"  # a later value wins
    check(run_forked(*line.split(), folder=tmp_path), tmp_path, expected)


@pytest.mark.parametrize("case", CHECKPOINTS)
@pytest.mark.parametrize("subcommand", ["test", "fit"])
def test_checkpoints(case, subcommand, files, tmp_path):
    name, expected = CHECKPOINTS[case]
    answer = run_forked(subcommand, f"--ckpt_path={files / name}", f"--data_dir={DATA}", folder=tmp_path)
    check(answer, tmp_path, expected)
    assert not (files / "executed").exists()


def test_the_malicious_pickle_would_have_been_executed(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_heavy_mistakes_in_processes_of_their_own(files, tmp_path):
    """The same end where Python starts from nothing; two at a time."""
    lines = [
        "--model lenet --trainer.max_epoch 3",
        f"--model lenet --data_dir {DATA} --val_size 2000",
        f"test --ckpt_path {files}/malicious.ckpt",
        "--model lenet --model.net.activation tanh",
    ]
    expected = ["--trainer.max_epochs?", "leaves none of", "never holds", "relu or sigmoid"]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda line: run(*line.split(), folder=tmp_path), lines))
    for answer, text in zip(answers, expected, strict=True):
        check(answer, tmp_path, text)
    assert not (files / "executed").exists()


def test_no_flipped_bit_passes_unnoticed(trained, tmp_path):
    """Wherever a bit flips, the file is refused or means the same as before."""
    good = trained.best.read_bytes()
    whole = torch.load(trained.best, weights_only=True)
    refused = 0
    for offset in range(7, len(good), len(good) // 150):
        damaged = bytearray(good)
        damaged[offset] ^= 4
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        try:
            content = read_checkpoint(path)
        except UserError:
            refused += 1
            continue
        assert content["state_dict"].keys() == whole["state_dict"].keys()
        for name, tensor in whole["state_dict"].items():
            assert torch.equal(content["state_dict"][name], tensor), f"byte {offset} changed {name}"
        assert content["config"] == whole["config"]
    assert refused > 100


def test_a_setting_that_contradicts_the_checkpoint(trained, tmp_path):
    for line, expected in (
        ("test --image_size 32", "image_size=28, not 32"),
        ("test --model alexnet", "models.lenet.LeNet, not models.alexnet.AlexNet"),
        ("fit --lr 0.1", "lr=0.005, not 0.1"),
        ("fit --max_epochs 5", "max_epochs=3, not 5"),
    ):
        answer = run_forked(*line.split(), f"--ckpt_path={trained.best}", f"--data_dir={DATA}", folder=tmp_path)
        check(answer, tmp_path, expected)


def test_a_plain_mistake_is_answered_before_torch_is_imported():
    code = "import sys, train; print(train.main(['--model', 'lenet', '--lr', 'x']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 False\n"
