"""Runs the trials of a sweep one after another, keeps their results in Optuna's storage, and writes the best recipe."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cli.command import Command, parse_command_line
from cli.recipes import UTF_8
from errors import MissingPackage, RunError, Stopped, UserError, one_line, printed_error, stopped_code
from runs.plots import draw_trials
from runs.reading import SWEEPS
from runs.record import write_json
from runs.report import rich_table, terminal
from runs.search_space import Choice, Range, Space, SweepRequest, checked_space, every_combination, in_order, spelled
from runs.sweep_recipe import check_output, to_train, write_recipe
from runs.training import STOPPED, start, training_lock

try:
    import optuna
    from optuna.exceptions import StorageInternalError
    from optuna.trial import FrozenTrial, Trial, TrialState
    from sqlalchemy import URL
    from sqlalchemy.exc import DBAPIError
except ImportError:
    raise MissingPackage("a sweep needs", "optuna") from None

POLL_SECONDS = 0.5
SHOWN = 10  # trials in the table


def sweep(request: SweepRequest) -> int:
    """Run the trials that are missing, write the best recipe, and show the table.

    Returns:
        The exit code.

    Raises:
        UserError: If the space or a flag is not valid, or another sweep.py is running.
        RunError: If no trial was finished.
        Stopped: By SIGTERM.
    """
    command = parse_command_line(["fit", "--model", request.recipe, *request.flags])
    assert command is not None
    assert command.recipe is not None
    name = command.recipe.replace("/", "-")
    folder = request.log_dir / SWEEPS / f"{name}-{_fingerprint(request, command)}"
    output = request.output or folder / f"{name}_best.yaml"
    check_output(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename} can't be written: {error.strerror}; set --log_dir") from None
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with training_lock(folder, ".lock"):
            study = _run_trials(request, command, folder, output)
    except (DBAPIError, StorageInternalError) as error:  # the disk is full, or somebody changed the file
        reason = error.orig if isinstance(error, DBAPIError) else one_line(str(error.__cause__ or error))
        raise RunError(f"{folder / 'study.db'} can't be used: {reason}") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    _print_table(study)
    write_json(folder / "trials.json", {"command": request.command, "trials": _listed(study, folder)})
    print(f"All trials: {folder / 'trials.json'}")
    try:
        tried = [(trial.params, float(trial.value or 0)) for trial in _completed(study)]
        draw_trials(request.space, tried, folder / "trials.png")
        print(f"Picture: {folder / 'trials.png'}")
    except MissingPackage as missing:
        print(missing)
    print(f"Recipe: {output}")
    print(f"Train it: {to_train(output)}")
    return 0


def _run_trials(request: SweepRequest, command: Command, folder: Path, output: Path) -> "optuna.Study":
    space = checked_space(request, folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = {
        "median": optuna.pruners.MedianPruner(n_warmup_steps=2),
        "hyperband": optuna.pruners.HyperbandPruner(),
        "none": optuna.pruners.NopPruner(),
    }[request.pruner]
    address = URL.create("sqlite", database=str((folder / "study.db").resolve()))  # whatever characters are in it
    storage = address.render_as_string(hide_password=False)
    study = optuna.create_study(
        study_name="sweep", storage=storage, direction="maximize", pruner=pruner, load_if_exists=True
    )
    every = every_combination(space, request.trials)
    done = _finished(study)
    tried = [trial.params for trial in done]  # maybe one twice, where fewer trials were asked for at first
    untried = sum(combination not in tried for combination in every)
    trials = min(request.trials, len(done) + untried) if every else request.trials
    print(f"{folder}: {len(done)} of {trials} trials done", flush=True)
    _enqueue_interrupted(study)
    while len(done) < trials:
        # A seed for each trial, so that a sweep that is stopped and continued draws what an uninterrupted one draws.
        study.sampler = optuna.samplers.TPESampler(seed=_seed(command) + len(done))
        tried = [trial.params for trial in study.trials]
        left = [combination for combination in every if combination not in tried]
        if left and not study.get_trials(states=[TrialState.WAITING]):
            study.enqueue_trial(left[0])
        trial = study.ask()
        settings = [f"--{name}={_suggest(trial, name, values)}" for name, values in in_order(space)]
        print(f"Trial {len(done) + 1} of {trials}: {_shown(settings)}", flush=True)
        trial.set_user_attr("folder", trial.user_attrs.get("folder", f"trial_{len(done) + 1}"))
        trial.set_user_attr("settings", settings)
        print(f"  {_run_trial(study, trial, request, folder)}", flush=True)
        done = _finished(study)
        if _completed(study):
            _remove_checkpoints(folder, keep=study.best_trial.user_attrs["folder"])
            _write_best(output, folder, study, request, command, space)
    if not _completed(study):
        raise RunError(f"no trial was finished; the reasons are in {folder}: remove it to try again, or raise --trials")
    _write_best(output, folder, study, request, command, space)  # maybe to another --output than before
    return study


def _run_trial(study: "optuna.Study", trial: Trial, request: SweepRequest, folder: Path) -> str:
    """Train with the trial's settings, and tell Optuna; returns one line for the terminal."""
    own, settings = trial.user_attrs["folder"], trial.user_attrs["settings"]
    for twin in study.get_trials(states=[TrialState.COMPLETE]):
        if twin.user_attrs["settings"] == settings:  # training is deterministic
            trial.set_user_attr("folder", twin.user_attrs["folder"])
            study.tell(trial, twin.value)
            return f"the same as {twin.user_attrs['folder']}: validation accuracy {twin.value:.4f}"
    code = _train(trial, request, folder / own)
    record = _record(folder / own)
    epochs = _epochs(record)
    if epochs:
        pictures = _pictures(record)
        known = pictures | study.user_attrs.get("pictures", {})
        if known | pictures != known:
            raise UserError(f"the pictures are not those of the earlier trials; remove {folder} and start again")
        study.set_user_attr("pictures", known)
    if code is None:
        study.tell(trial, state=TrialState.PRUNED)
        return f"given up after epoch {len(epochs)}, validation accuracy {_accuracy(epochs):.4f}"
    if code == 0 and epochs:
        seconds = record["fit_seconds"]
        trial.set_user_attr("seconds", seconds)
        accuracy = record.get("best_val_accuracy", _accuracy(epochs))  # of its best.ckpt, which may be within an epoch
        study.tell(trial, accuracy)
        return f"validation accuracy {accuracy:.4f} in {seconds:.1f} s"
    study.tell(trial, state=TrialState.FAIL)
    said = printed_error((folder / own / "output.txt").read_text(encoding="utf-8", errors="replace"))
    return f"failed: {f'killed by signal {-code}' if code < 0 else said or f'exit code {code}'}"


def _train(trial: Trial, request: SweepRequest, folder: Path) -> int | None:
    """Run or continue train.py; returns its exit code, or None if the trial was pruned."""
    folder.mkdir(exist_ok=True)
    arguments = ["fit", "--model", request.recipe, f"--log_dir={folder}", *request.flags]
    arguments += trial.user_attrs["settings"]
    if stopped := sorted(folder.rglob("last.ckpt")):
        arguments.append(f"--ckpt_path={stopped[-1]}")
    reported = 0
    with (
        (folder / "output.txt").open("a", encoding="utf-8") as output,
        start(arguments, stdout=output, stderr=subprocess.STDOUT, env=os.environ | UTF_8) as process,
    ):
        code = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(POLL_SECONDS)
            for epoch in _epochs(_record(folder))[reported:]:
                trial.report(epoch["val/accuracy"], epoch["epoch"])
                reported += 1
                if code is None and trial.should_prune():
                    return None  # it is ended
    if code in STOPPED:
        raise Stopped(
            "The training was stopped. The same command continues from here.", stopped_code(-code) if code < 0 else code
        )
    return code


def _stop(signum: int, frame: Any) -> None:
    raise Stopped("Stopped by SIGTERM. The same command continues from here.", 143)


def _fingerprint(request: SweepRequest, command: Command) -> str:
    """What identifies a sweep: the recipe's content, the space and the flags."""
    texts = [path.read_bytes().decode("utf-8", "replace") for path in (*command.configs, *command.outer_configs)]
    whole = json.dumps([texts, sorted(request.spelled), request.flags])
    return hashlib.sha256(whole.encode()).hexdigest()[:8]


def _seed(command: Command) -> int:
    given = [flag.partition("=")[2] for flag in command.overrides if flag.startswith("--seed_everything=")]
    return int(given[-1]) if given and given[-1].isdecimal() else 0


def _suggest(trial: Trial, name: str, values: Range | Choice) -> str:
    if isinstance(values, Choice):
        return trial.suggest_categorical(name, values.values)
    if values.whole:
        return spelled(trial.suggest_int(name, int(values.low), int(values.high), log=values.log))
    return spelled(trial.suggest_float(name, values.low, values.high, log=values.log))


def _enqueue_interrupted(study: "optuna.Study") -> None:
    """Continue a trial that was running when the last sweep.py ended, as a new trial that takes over its folder."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        if "settings" in trial.user_attrs:
            study.enqueue_trial(trial.params, user_attrs={**trial.user_attrs, "continues": trial.number})


def _finished(study: "optuna.Study") -> list[FrozenTrial]:
    """Trials that ended, without those that another trial continued."""
    trials = study.get_trials(deepcopy=False)
    taken_over = {trial.user_attrs.get("continues") for trial in trials}
    begun = [trial for trial in trials if "settings" in trial.user_attrs and trial.number not in taken_over]
    return [trial for trial in begun if trial.state.is_finished()]


def _completed(study: "optuna.Study") -> list[FrozenTrial]:
    """Finished trials, the best first, without repetitions."""
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    each = {trial.user_attrs["folder"]: trial for trial in reversed(trials)}
    return sorted(each.values(), key=lambda trial: (-(trial.value or 0), trial.number))


def _listed(study: "optuna.Study", folder: Path) -> list[dict[str, Any]]:
    """Every trial that ended, in order: its settings, and how far it got."""
    listed = []
    for trial in _finished(study):
        own = trial.user_attrs["folder"]
        record = _record(folder / own)
        how = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "given up early"}.get(trial.state, "failed")
        epochs = [epoch["val/accuracy"] for epoch in _epochs(record)]
        settings = [text.removeprefix("--") for text in trial.user_attrs["settings"]]
        known = {name: record.get(name) for name in ("seed", "commit", "machine", "versions", "fit_seconds")}
        listed.append({"trial": own, "settings": settings, "ended": how, "val_accuracy_by_epoch": epochs} | known)
    return listed


def _record(folder: Path) -> dict[str, Any]:
    """What the run in a trial's folder has recorded so far; empty before the end of its first epoch."""
    files = sorted(folder.rglob("record.json"))
    with suppress(PermissionError):  # on Windows it may be being replaced
        return json.loads(files[-1].read_text(encoding="utf-8")) if files else {}
    return {}


def _epochs(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [epoch for epoch in record.get("epochs", []) if "val/accuracy" in epoch]


def _pictures(record: dict[str, Any]) -> dict[str, Any]:
    """What is known of a trial's pictures: their classes, and how many there are where each is used."""
    data, trainer = record["config"]["data"], record["config"]["trainer"]
    limited = any(trainer.get(f"{name}_batches") for name in ("limit_train", "limit_val", "overfit"))
    names = () if limited else ("train_images", "val_images")
    return {"class_names": data.get("class_names")} | {name: record.get(name) for name in names}


def _accuracy(epochs: Iterable[dict[str, Any]]) -> float:
    """The accuracy of the best epoch, whose checkpoint train.py keeps."""
    return max((epoch["val/accuracy"] for epoch in epochs), default=0.0)


def _write_best(
    output: Path, folder: Path, study: "optuna.Study", request: SweepRequest, command: Command, space: Space
) -> None:
    best = study.best_trial
    write_recipe(output, _record(folder / best.user_attrs["folder"]), best.value or 0.0, request, command, space)


def _remove_checkpoints(folder: Path, keep: str) -> None:
    """Remove the checkpoints of all trials but the best: those of twenty VGGs fill a disk."""
    for checkpoints in list(folder.glob("trial_*/**/checkpoints")):
        if checkpoints.relative_to(folder).parts[0] != keep:
            shutil.rmtree(checkpoints, ignore_errors=True)


def _shown(settings: Iterable[str]) -> str:
    return ", ".join(
        f"{name.rpartition('.')[2]} {value}" for name, _, value in (text.partition("=") for text in settings)
    )


def _print_table(study: "optuna.Study") -> None:
    console = terminal()
    completed, finished = _completed(study), _finished(study)
    rows = []
    for trial in completed[:SHOWN]:
        cells = [trial.user_attrs["folder"].removeprefix("trial_"), f"{trial.value:.4f}"]
        rows.append([*cells, f"{trial.user_attrs['seconds']:.1f} s", _shown(trial.user_attrs["settings"])])
    columns = ("trial", "validation accuracy", "time", "settings")
    console.print(rich_table(columns, rows, left=("settings",), bold_first=True))
    counts = {state: sum(trial.state == state for trial in finished) for state in TrialState}
    rest = {"given up early": counts[TrialState.PRUNED], "failed": counts[TrialState.FAIL]}
    rest["more finished"] = max(len(completed) - SHOWN, 0)
    if left := ", ".join(f"{count} {what}" for what, count in rest.items() if count):
        print(left)
