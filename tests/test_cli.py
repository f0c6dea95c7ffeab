"""The command line: flags, recipes, and mistakes that are seen without torch."""

import itertools
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compare
import demo
import export
import sweep
from benchmarks.harness import side_by_side
from cli.command import parse_command_line
from cli.flags import FLAGS, SUBCOMMANDS, help_text
from cli.recipes import load_yaml, recipes
from errors import UserError, count, importing, typed, written_aside

REPO = Path(__file__).parents[1]


def parse(line):
    command = parse_command_line(line.split())
    assert command is not None
    return command


def refusal(line):
    with pytest.raises(UserError) as caught:
        parse(line)
    return str(caught.value)


def test_a_recipe_alone_is_fit_followed_by_test():
    command = parse("--model alexnet")
    assert (command.subcommand, command.then_test, command.recipe) == ("fit", True, "alexnet")
    assert command.configs == [REPO / "configs" / "alexnet.yaml"]
    assert command.overrides == []


def test_an_unknown_recipe_lists_them_all():
    listed = refusal("--model zzzzz").partition("the recipes are: ")[2].split(", ")
    assert set(listed) == set(recipes()) and "/" not in listed[0]


def test_what_is_to_be_typed_suits_the_systems_shells(monkeypatch, capsys) -> None:
    words = ["python", "train.py", "--model", "lenet", "--log_dir", "my runs"]
    assert typed(words) == "python train.py --model lenet --log_dir 'my runs'"
    with monkeypatch.context() as windows, pytest.raises(SystemExit), importing("train.py"):
        windows.setattr("os.name", "nt")
        assert typed([*words, "D:/R&D(1)"]) == 'python train.py --model lenet --log_dir "my runs" "D:/R&D(1)"'
        raise ModuleNotFoundError(name="torch")
    assert r"use .venv\Scripts\python, or make it: py -m venv .venv, then .venv\Scripts\pip" in capsys.readouterr().err


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def hung_up() -> Iterator[int]:
    """A terminal that was closed."""
    terminal, writing = pty.openpty()
    os.close(terminal)
    yield writing
    os.close(writing)


PRINTING = """
import sys
from pathlib import Path
from errors import run_program

def run():
    for _ in range(2):
        for stream in (sys.stdout, sys.stderr):
            print("a line", file=stream, flush=True)
    Path("done").touch()

sys.exit(run_program("x.py", run))
"""


@pytest.mark.parametrize("output", ["unread", "hung_up", "closed"])
def test_a_program_outlives_whoever_reads_what_it_prints(output, tmp_path, request):
    (tmp_path / "x.py").write_text(PRINTING)
    command = ["sh", "-c", f'"$0" x.py {">&- 2>&-" if output == "closed" else ""}', sys.executable]
    stream = None if output == "closed" else request.getfixturevalue(output)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=stream, stderr=stream, timeout=60)
    assert (done.returncode, (tmp_path / "done").exists()) == (0, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_disk_that_is_full_ends_a_program_that_prints_to_it(tmp_path):
    (tmp_path / "x.py").write_text(PRINTING)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "x.py"], cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode and b"No space left on device" in done.stderr and not (tmp_path / "done").exists()


def test_ctrl_c_ends_imports_at_once_though_nobody_reads_that(unread):
    code = "import os, signal, errors\nwith errors.ended_by_ctrl_c(): os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, stderr=unread, timeout=60)
    assert done.returncode == 128 + signal.SIGINT


def test_counts_agree_with_their_nouns():
    counted = [count(number, noun) for number in (0, 1, 2000) for noun in ("epoch", "batch", "process")]
    assert counted[:3] == ["0 epochs", "0 batches", "0 processes"]
    assert counted[3:6] == ["1 epoch", "1 batch", "1 process"]
    assert counted[6:] == ["2,000 epochs", "2,000 batches", "2,000 processes"]


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_a_subcommand_does_only_that(subcommand):
    command = parse(f"{subcommand} --model lenet --ckpt_path some.ckpt")
    assert (command.subcommand, command.then_test) == (subcommand, False)


@pytest.mark.parametrize("subcommand", [name for name in SUBCOMMANDS if name != "fit"])
def test_untrained_weights_are_not_measured(subcommand):
    with pytest.raises(UserError, match=f"^nothing to {subcommand}.*--ckpt_path"):
        parse(f"{subcommand} --model lenet")


VALUES = {
    "--accelerator": "gpu",
    "--devices": "2",
    "--num_nodes": "2",
    "--precision": "bf16-mixed",
    "--max_epochs": "7",
    "--batch_size": "31",
    "--lr": "0.25",
    "--image_size": "40",
    "--val_size": "0",
    "--seed": "3",
    "--patience": "2",
    "--data_dir": "somewhere",
    "--log_dir": "elsewhere",
}


def test_every_flag_with_a_long_form_is_tried_below():
    translated = {name for name, flag in FLAGS.items() if flag.target and flag.check and name != "--ckpt_path"}
    assert translated == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("separator", ["=", " "])
def test_a_short_flag_becomes_its_long_form(name, separator):
    assert parse(f"--model lenet {name}{separator}{VALUES[name]}").overrides == [f"{FLAGS[name].target}={VALUES[name]}"]


def test_short_flags_mean_what_their_names_say():
    line = "--model lenet --lr 1 --batch_size 2 --image_size 32 --max_epochs 3 --seed 4 --devices 2 --compile"
    assert parse(line).overrides == [
        "--model.optimizer.init_args.lr=1",
        "--data.batch_size=2",
        "--data.image_size=32",
        "--trainer.max_epochs=3",
        "--seed_everything=4",
        "--trainer.devices=2",
        "--model.compile=true",
    ]


def test_the_order_of_words_does_not_matter():
    words = ["fit", "--model lenet", "--lr 0.1", "--trainer.max_epochs 3"]
    commands = [parse(" ".join(order)) for order in itertools.permutations(words)]
    for command in commands:
        assert (command.subcommand, command.then_test, command.recipe) == ("fit", False, "lenet")
        assert command.configs == [recipes()["lenet"]]
        flags = set(" ".join(command.overrides).split(" --"))
        assert {flag.lstrip("-") for flag in flags} == {"model.optimizer.init_args.lr=0.1", "trainer.max_epochs 3"}


def test_the_last_of_two_values_comes_last():
    assert parse("--model lenet --lr 1 --lr 2").overrides[-1] == "--model.optimizer.init_args.lr=2"


def test_files_are_laid_over_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("data: {batch_size: 3}")
    Path("two.yaml").write_text("data: {batch_size: 4}")
    command = parse("--config one.yaml --model lenet --config two.yaml")
    assert command.configs == [recipes()["lenet"], Path("one.yaml"), Path("two.yaml")]


def test_a_file_by_subcommand_is_kept_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("all.yaml").write_text("fit: {data: {batch_size: 3}}")
    command = parse("--config all.yaml fit")
    assert (command.outer_configs, command.configs) == ([Path("all.yaml")], [])


def test_the_home_folder_is_known_where_the_shell_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows'
    command = parse("--model lenet --log_dir=~/runs --data_dir=~/data --ckpt_path=~/a.ckpt")
    assert [command.log_dir, command.ckpt_path] == [f"{tmp_path}/runs", f"{tmp_path}/a.ckpt"]
    assert f"--data.data_dir={tmp_path}/data" in command.overrides
    (tmp_path / "own.yaml").write_text("{log_dir: ~/runs, ckpt_path: ~/b.ckpt}")
    command = parse("--config=~/own.yaml test")
    assert [command.log_dir, command.ckpt_path] == [f"{tmp_path}/runs", f"{tmp_path}/b.ckpt"]
    assert export.parser().parse_args(["--ckpt_path=~/a.ckpt", "--format=onnx"]).ckpt_path == tmp_path / "a.ckpt"


@pytest.mark.parametrize(
    "read",
    [
        lambda path: parse(f"--model lenet --log_dir={path}"),
        lambda path: parse(f"--model lenet --data_dir={path}"),
        lambda path: parse(f"--model lenet --data {path}"),
        lambda path: parse(f"predict --ckpt_path=a.ckpt --images {path}"),
        lambda path: export.parser().parse_args(["--ckpt_path=a.ckpt", "--format=onnx", f"--output={path}"]),
        lambda path: compare.parse([path]),
        lambda path: sweep.parse(["lenet", "--space=lr=1,2", f"--log_dir={path}"]),
        lambda path: demo.parser().parse_args([path]),
        lambda path: side_by_side.Parser(None, 1.0).parse_args([f"--data_dir={path}"]),
    ],
)
def test_the_home_folder_of_nobody_is_refused_unless_something_bears_that_name(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^~nobody_of_this_name: nobody here has that home folder; give the path in full"
    ):
        read("~nobody_of_this_name")
    (tmp_path / "~nobody_of_this_name").mkdir()
    assert "~nobody_of_this_name" in str(vars(read("~nobody_of_this_name")))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as written:
        written.write_text("half")
        raise KeyboardInterrupt
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    with written_aside(path) as written:
        assert written.suffix == ".onnx"
        written.write_text("new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


def test_checkpoint_and_folder_may_stand_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("all.yaml").write_text("test: {ckpt_path: one.ckpt, log_dir: runs}")
    Path("own.yaml").write_text("model: {}\nckpt_path: null\nlog_dir: other")
    command = parse("--config all.yaml test")
    assert (command.ckpt_path, command.log_dir) == ("one.ckpt", "runs")
    command = parse("--config all.yaml test --ckpt_path two.ckpt --log_dir=mine")
    assert (command.ckpt_path, command.log_dir) == ("two.ckpt", "mine")
    command = parse("--model own.yaml")
    assert (command.ckpt_path, command.log_dir) == (None, "other")
    Path("empty.yaml").write_text("test: {model: {}}")
    with pytest.raises(UserError, match="nothing to test"):
        parse("--config empty.yaml test")


def test_all_processes_of_a_run_continue_from_the_same_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLASSIC_CNNS_LAST", "")  # so that what is set under test is taken back
    monkeypatch.delenv("CLASSIC_CNNS_LAST")
    one, two = (Path(f"logs/lenet/version_{number}/checkpoints/last.ckpt") for number in range(2))
    one.parent.mkdir(parents=True)
    one.touch()
    line = "--model lenet --ckpt_path last"
    assert parse(line).ckpt_path == str(one)
    two.parent.mkdir(parents=True)  # by another run, before the second process has started
    two.touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse(line).ckpt_path == str(one)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert parse(line).ckpt_path == str(two)


def test_a_recipe_may_be_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("model: {}")
    command = parse("--model own.yaml")
    assert (command.recipe, command.configs) == ("own", [Path("own.yaml")])


def test_a_config_of_this_project_gives_the_run_its_name():
    assert parse(f"fit --config {REPO / 'configs' / 'nin.yaml'}").recipe == "nin"


def test_long_flags_pass_through_with_their_values():
    overrides = parse("--model lenet --trainer.max_epochs 3 --model.net.padding=0 --data.mean -0.5").overrides
    assert overrides == ["--trainer.max_epochs", "3", "--model.net.padding=0", "--data.mean", "-0.5"]


@pytest.mark.parametrize("line", ["--help", "-h", "--model lenet --help"])
def test_help_is_asked_for(line):
    assert parse_command_line(line.split()) is None


def test_help_of_a_subcommand_is_lightning_clis():
    assert parse("fit --help").overrides == ["--help"]
    assert parse("fit --model lenet --ckpt_path last --help").overrides == ["--help"]


def test_help_fits_a_screen_and_names_everything():
    lines = help_text().splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 110
    text = "\n".join(lines)
    for name in FLAGS:
        assert any(line.startswith(f"  {name} ") for line in lines), name
    for description in SUBCOMMANDS.values():
        assert description in text
    words = text.partition("recipes:")[2].split()
    assert set(recipes()) <= set(words)
    assert "fit --help" in lines[-1]


def test_help_does_not_import_torch():
    code = "import sys, train; train.main(['--help']); print(*{'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("--model alexnett", "alexnet"),
        ("--model vgg_11", "vgg11"),
        ("--model GoogLeNet", "googlenet"),
        ("--model best/alexnt", "best/alexnet"),
        ("--model configs/alexnt.yaml", "alexnet"),
        ("--model lenet --epoch 3", "--max_epochs"),
        ("--model lenet --epochs 3", "--max_epochs"),
        ("--model lenet --bath_size 3", "--batch_size"),
        ("--model lenet --batchsize 3", "--batch_size"),
        ("--model lenet --acelerator cpu", "--accelerator"),
        ("--model lenet --device 2", "--devices"),
        ("--model lenet --checkpoint_path x", "--ckpt_path"),
        ("--model lenet --learning_rate 0.1", "--lr"),
        ("--model lenet --optimizer SGD", "--model.optimizer"),
        ("--model lenet --lr_scheduler StepLR", "--model.scheduler"),
        ("--model lenet --num_workers=2", "--data.num_workers"),
        ("--model lenet --fast_dev_run", "--trainer.fast_dev_run"),
        ("--model lenet --gpus 2", "--devices"),
        ("--model lenet --resume x", "--ckpt_path"),
        ("--recipe lenet", "--model"),
        ("tets --model lenet", "test"),
        ("lenet", "--model lenet"),
    ],
)
def test_did_you_mean(line, meant):
    assert f"did you mean {meant}?" in refusal(line)


@pytest.mark.parametrize("value", ["false", "False", "TRUE"])
def test_what_is_on_can_be_switched_off(value):
    for line in (f"--model lenet --class_weights={value}", f"--model lenet --class_weights {value}"):
        assert parse(line).overrides == [f"--class_weights={value.lower()}"]
    assert parse(f"--pretrained {value} --model vgg16").overrides == [f"--pretrained={value.lower()}"]
    request = compare.parse(["--train", "lenet", "--class_weights", value])
    assert request is not None and request.flags == ["--class_weights", value]


def test_a_switch_says_what_it_takes():
    assert refusal("--model lenet --class_weights=yes") == "--class_weights takes nothing, true or false, got 'yes'"
    assert refusal("--model lenet --print_model=true") == "--print_model takes no value, got 'true'"


def test_a_folder_of_pictures_has_one_name(tmp_path, monkeypatch):
    for name in ("here", "photos", "elsewhere/deep", "elsewhere/photos"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/deep")
    monkeypatch.chdir(tmp_path / "here")
    for name in ("../photos", f"{tmp_path}/here/../photos/."):
        assert parse(f"--model lenet --data {name}").overrides[0] == f"--data.folder={tmp_path}/photos"
    assert parse("--model lenet --data ../link/../photos").overrides[0].endswith("/link/../photos")  # of elsewhere


def test_settings_beside_sections_are_not_passed_over(tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text("seed_everything: 3\nfit: {data: {batch_size: 64}}\n")
    assert "all.yaml: seed_everything stands beside the section fit" in refusal(f"--model lenet --config {file}")


def test_a_checkpoint_in_place_of_a_recipe():
    assert "give --ckpt_path weights/lenet.ckpt" in refusal("--model weights/lenet.ckpt")


def test_the_last_run_of_a_network_without_a_recipe(tmp_path):
    found = tmp_path / "unnamed" / "version_0" / "checkpoints" / "last.ckpt"
    found.parent.mkdir(parents=True)
    found.touch()
    line = f"fit --model.net models.lenet.LeNet --log_dir {tmp_path} --ckpt_path last"
    assert parse(line).ckpt_path == str(found)
    assert "add --model RECIPE" in refusal(f"test --log_dir {tmp_path} --ckpt_path last")


def test_settings_without_a_network_go_on_top_of_a_checkpoint(tmp_path):
    (tmp_path / "more.yaml").write_text("data: {batch_size: 64}\n")
    command = parse(f"fit --config {tmp_path / 'more.yaml'} --ckpt_path x.ckpt")
    assert (command.names_a_net, command.recipe) == (False, None)
    assert parse("fit --model lenet --ckpt_path x.ckpt").names_a_net
    own = f"fit --config {tmp_path / 'more.yaml'} --model.net mine.Net --ckpt_path x.ckpt"
    assert parse(own).names_a_net  # the checkpoint need not be trusted to name it
    assert not parse(own.replace("--model.net mine.Net", "--model.net.padding 1")).names_a_net


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "nan", "1e3"])
def test_a_batch_size_is_a_positive_integer(value):
    assert refusal(f"--model lenet --batch_size={value}").startswith(
        "--batch_size must be an integer of at least 1, got"
    )


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e400", "x", ""])
def test_a_learning_rate_is_a_positive_number(value):
    assert refusal(f"--model lenet --lr={value}") == f"--lr must be a positive number, got {value!r}"


@pytest.mark.parametrize("value", ["auto", "1", "8", "-1", "0,1", "3,"])
def test_devices_that_lightning_takes(value):
    assert parse(f"--model lenet --devices={value}").overrides == [f"--trainer.devices={value}"]


@pytest.mark.parametrize("value", ["abc", "0", "-2", "1.5", "0;1"])
def test_devices_that_nobody_has(value):
    assert refusal(f"--model lenet --devices={value}").startswith("--devices must be")


@pytest.mark.parametrize("value", ["-1", "1"])
def test_epochs(value):
    assert parse(f"--model lenet --max_epochs {value}").overrides == [f"--trainer.max_epochs={value}"]


def test_a_negative_number_is_a_value_not_a_flag():
    assert refusal("--model lenet --lr -1") == "--lr must be a positive number, got '-1'"


def test_a_flag_is_not_a_value():
    assert refusal("--model lenet --lr --compile").startswith("--lr needs a value")


def test_duplicate_keys_are_named_with_their_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("data:\n  batch_size: 1\n  batch_size: 2\n")
    with pytest.raises(UserError, match=r"'batch_size' appears twice, the second time in line 3"):
        load_yaml(path)


def test_the_same_key_in_two_mappings_is_no_duplicate(tmp_path):
    path = tmp_path / "fine.yaml"
    path.write_text("a: {lr: 1}\nb: {lr: 2}\n")
    assert load_yaml(path) == {"a": {"lr": 1}, "b": {"lr": 2}}


def test_a_mapping_may_replace_what_is_merged_into_it(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {<<: &b {lr: 1}, lr: 2}\nc: {<<: *a, momentum: 3}\nd: {<<: [*a, *b], lr: 4}\n")
    assert load_yaml(path) == {"a": {"lr": 2}, "c": {"lr": 2, "momentum": 3}, "d": {"lr": 4}}
    for twice in ("c: {<<: *a, lr: 2, lr: 3}", "c: {<<: {lr: 2, lr: 3}}"):
        path.write_text(f"a: &a {{lr: 1}}\n{twice}\n")
        with pytest.raises(UserError, match=r"'lr' appears twice, the second time in line 2"):
            load_yaml(path)


@pytest.mark.parametrize("flag", ["--ckpt_path last", "--ckpt_path=last"])
def test_the_newest_run_is_continued(tmp_path, flag):
    assert "there is no run of lenet" in refusal(f"--model lenet --log_dir {tmp_path} {flag}")
    paths = [tmp_path / "lenet" / f"version_{number}" / "checkpoints" / "last.ckpt" for number in (9, 10)]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
    assert parse(f"{flag} --model lenet --log_dir {tmp_path}").ckpt_path == str(paths[1])


def test_last_passes_over_nine_checkpoints_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSIC_CNNS_LAST", "")  # so that what is set under test is taken back
    paths = [tmp_path / "lenet" / f"version_{number}" / "checkpoints" / "last.ckpt" for number in range(30)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (number, number))
    command = parse(f"--model lenet --log_dir {tmp_path} --ckpt_path last")
    assert [command.ckpt_path, *command.fallbacks] == [str(path) for path in reversed(paths[20:])]


@pytest.mark.parametrize("arguments", [["-\n"], ["--config", "\n"], ["--lr", "a\nb"]])
def test_an_error_stays_one_line_whatever_was_typed(arguments):
    with pytest.raises(UserError) as error:
        parse_command_line(arguments)
    assert "\\n" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dash", ["—", "–", "−", "‑", "–-"])
def test_a_dash_from_a_page_is_named_with_what_to_type(dash: str) -> None:
    with pytest.raises(UserError, match=f"{dash}model .*; type --model"):
        parse_command_line([f"{dash}model", "lenet"])


@pytest.mark.parametrize("door", ["train", "compare", "sweep", "export", "demo"])
def test_every_command_names_what_a_page_or_a_forgotten_environment_spoilt(door: str) -> None:
    def said(*options: str) -> str:
        done = subprocess.run([sys.executable, *options], cwd=REPO, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    told = said("-S", f"{door}.py", *(["--model", "lenet"] if door == "train" else []))
    assert "use .venv/bin/python, or make it: python3" in told
    assert f"{door}.py: error: —log_dir" in said(f"{door}.py", "—log_dir", "logs")


@pytest.mark.parametrize("flag", ["--images", "--config", "--log_dir", "--data_dir", "--output", "--ckpt_path"])
def test_an_address_is_shown_as_it_was_typed(flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} must be a path on this machine .*'https://example.com/a.jpg'"):
        parse_command_line(["predict", flag, "https://example.com/a.jpg"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the last is PowerShell's
def test_a_recipe_says_by_its_first_bytes_how_it_is_encoded(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("data: {folder: 数据}\n".encode(encoding))
    assert load_yaml(tmp_path / "mine.yaml") == {"data": {"folder": "数据"}}


def test_a_recipe_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("data: {folder: 数据}\n".encode("gbk"))
    with pytest.raises(UserError, match=r"mine.yaml is not valid YAML: .*octet") as error:
        load_yaml(tmp_path / "mine.yaml")
    assert "\n" not in str(error.value) and "\\" not in str(error.value)
