"""What training continues from: the state in a checkpoint, checked against the objects that will take it over.

A state is not trusted either. Lightning and torch write it unchecked over attributes of callbacks, schedules and
optimisers, follow the paths in it, and torch's fused optimisers read past the end of tensors that are too small.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints.plain import check_plain
from errors import UserError

OPTIMIZERS = ("torch.optim.", "optimizers.")  # modules of optimisers whose state is known
SCHEDULES = ("torch.optim.", "lit_modules.", "lightning.")  # modules of schedules whose state is known
# What changes in the state of a schedule of torch's; the rest are its settings.
PROGRESS = {"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter"}
# What loading such a state always needs.
NEEDED = ("lr_lambdas", "_scale_fn_custom")
PROBE = (2, 3, 5, 7, 11)  # sizes of a stand-in parameter, all different


class _MisfitError(Exception):
    """State of a kind that the object does not have; the message names the place."""


def check_state(checkpoint: dict[str, Any], trainer: Any, module: Any, of_length: Callable[..., Any]) -> None:
    """Make a checkpoint that a Trainer has read safe to restore: in place, before anything is restored.

    Args:
        checkpoint: Its content.
        trainer: The Trainer that restores it.
        module: The classifier, its network built.
        of_length: Makes a schedule whose length was left open.

    Raises:
        UserError: If state does not fit.
    """
    path = str(trainer.ckpt_path or "the checkpoint")
    check_plain({key: value for key, value in checkpoint.items() if key != "callbacks"}, path)
    training = trainer.state.fn == TrainerFn.FITTING
    try:
        checkpoint["callbacks"] = _callbacks(checkpoint.get("callbacks") or {}, trainer, training)
        if not training:  # measuring depends only on the weights
            checkpoint.pop("loops", None)
            return
        checkpoint["loops"] = {"fit_loop": _loops(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict())}
        _check_average(checkpoint, module)
        _check_scaler(checkpoint, type(trainer.precision_plugin).__qualname__)
        optimizer = module.optimizer(module.parameters())
        (state,) = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [_optimizer(state, optimizer, module)]
        schedules = checkpoint["lr_schedulers"]
        if module.scheduler:
            done = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
            steps = done["optimizer"]["step"]["total"]["completed"]
            own = of_length(module.scheduler, optimizer, 1000)  # any length, as only its state is checked
            schedules = [_schedule(schedules[0], own, steps)]
        checkpoint["lr_schedulers"] = schedules
    except _MisfitError as misfit:
        raise UserError(
            f"{path} is damaged: {misfit} is not what this run has there; training can't continue from it"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = str(error).strip("'") or type(error).__name__
        raise UserError(
            f"{path} is damaged: its state can't be restored ({what}); training can't continue from it"
        ) from None


def _like(own: Any, stored: Any, place: str) -> Any:
    """The numbers of a stored state in the shape of an object's own; its texts, flags and functions stay.

    Raises:
        _MisfitError: If a number or a tensor is where the other has none, or makes no sense.
    """
    if isinstance(own, Mapping):
        if not isinstance(stored, Mapping):
            raise _MisfitError(place)
        return {key: _like(value, stored.get(key, value), f"{place}.{key}") for key, value in own.items()}
    if isinstance(own, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(own):
            raise _MisfitError(place)
        return type(own)(_like(*pair, place) for pair in zip(own, stored, strict=True))
    if isinstance(own, Tensor):
        same = isinstance(stored, Tensor) and stored.is_floating_point() == own.is_floating_point()
        if not same or stored.shape != own.shape:
            raise _MisfitError(place)
        return stored
    if isinstance(own, bool) or not isinstance(own, int | float):
        return own
    if isinstance(stored, Tensor) and stored.numel() == 1:
        stored = stored.item()
    if isinstance(stored, bool) or not isinstance(stored, int if isinstance(own, int) else int | float):
        raise _MisfitError(place)
    if math.isnan(stored) or (isinstance(own, int) and not -1 <= stored < 2**40):
        raise _MisfitError(place)
    return stored


def _loops(stored: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The counts of batches, steps and epochs; is_last_batch is a flag that counts as well."""
    merged = _like(own, stored, "loops")

    def flags(own: dict[str, Any], stored: Any) -> None:
        for key, value in own.items():
            if isinstance(value, dict):
                flags(value, stored.get(key, {}))
            elif isinstance(value, bool):
                own[key] = bool(stored.get(key, value))
            elif value < 0:
                raise _MisfitError(f"loops.{key}")

    flags(merged, stored)
    return merged


def _callbacks(stored: Any, trainer: Any, training: bool) -> dict[str, Any]:
    """The states of the Trainer's callbacks; the user's own callbacks handle their own."""
    kept = {}
    for callback in trainer.callbacks:
        state = stored.get(callback.state_key, stored.get(callback._legacy_state_key))
        if state is None:
            continue
        if isinstance(callback, ModelCheckpoint):
            if training:
                kept[callback.state_key] = _checkpoints(state, callback, trainer)
        elif isinstance(callback, EarlyStopping | WeightAveraging):
            kept[callback.state_key] = _like(callback.state_dict(), state, callback.state_key)
            if isinstance(callback, EarlyStopping):
                kept[callback.state_key]["patience"] = callback.patience  # may be given anew
        else:
            kept[callback.state_key] = state
    return kept


def _checkpoints(state: dict[str, Any], callback: ModelCheckpoint, trainer: Any) -> dict[str, Any]:
    """What `ModelCheckpoint` saved so far: files in its own folder or beside the checkpoint. Others it may remove."""
    folders = [Path(folder) for folder in (callback.dirpath, Path(trainer.ckpt_path).parent) if folder]
    deep = (callback.filename or "").count("/")  # metrics have a slash in their names

    def inside(path: Any) -> str:
        name = Path(path) if isinstance(path, str) and "\0" not in path else Path()
        for folder in folders:
            if name.suffix == ".ckpt" and folder.resolve() in name.resolve().parents[: deep + 1] and not name.is_dir():
                return str(folder / name.resolve().relative_to(folder.resolve()))
        return ""

    def score(value: Any) -> Tensor | None:
        if value is not None and (not isinstance(value, Tensor) or value.numel() != 1):
            raise _MisfitError(f"a score of {type(callback).__name__}")
        return value

    best = {inside(path): score(value) for path, value in state["best_k_models"].items()}
    worst = inside(state["kth_best_model_path"])
    full = 0 < callback.save_top_k <= len(best)  # until then Lightning doesn't say which is the worst
    if None in best.values() or "" in best or (full and worst not in best):
        best, worst = {}, ""
    return {
        "monitor": callback.monitor,
        "best_model_score": score(state["best_model_score"]),
        "best_model_path": inside(state["best_model_path"]),
        "current_score": score(state["current_score"]),
        "dirpath": state["dirpath"] if isinstance(state["dirpath"], str) else "",
        "best_k_models": best,
        "kth_best_model_path": worst,
        "kth_value": callback.kth_value if score(state["kth_value"]) is None else state["kth_value"],
        "last_model_path": inside(state["last_model_path"]),
    }


def _check_average(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Weight averaging loads a second set of weights, and how many it has averaged."""
    if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
        return
    _same_shapes(checkpoint["current_model_state"], module.state_dict(), "current_model_state")
    averaged = checkpoint["averaging_state"]["n_averaged"]
    if averaged.numel() != 1 or averaged.is_floating_point() or not 0 <= averaged.item() < 2**40:
        raise _MisfitError("averaging_state")
    checkpoint["averaging_state"] = {"n_averaged": averaged.reshape(())}


def _check_scaler(checkpoint: dict[str, Any], plugin: str) -> None:
    """Mixed precision in float16 loads the scale of its gradients."""
    checkpoint.pop("native_amp_scaling_state", None)  # of early versions of Lightning's
    scaler = checkpoint.get(plugin)
    if scaler is not None and not (scaler and all(_is_number(value) and value >= 0 for value in scaler.values())):
        raise _MisfitError(plugin)


def _same_shapes(stored: Any, own: Mapping[str, Tensor], place: str) -> None:
    if {name: tensor.shape for name, tensor in stored.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise _MisfitError(place)


def _optimizer(stored: dict[str, Any], optimizer: Optimizer, module: Any) -> dict[str, Any]:
    """The state of an optimiser: each tensor of the shape that the optimiser gives it, with its parameter's strides."""
    groups: list[dict[str, Any]] = []
    numbered: dict[Any, Tensor] = {}
    sizes = [[len(group["params"]) for group in of] for of in (stored["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise _MisfitError("optimizer_states")
    kinds_of = [kind for kind in type(optimizer).__mro__ if issubclass(kind, Optimizer) and kind is not Optimizer]
    if not any(f"{kind.__module__}.".startswith(OPTIMIZERS) for kind in kinds_of):
        return stored  # only its author knows what it keeps
    for own, theirs in zip(optimizer.param_groups, stored["param_groups"], strict=True):
        settings = _like({key: value for key, value in own.items() if key != "params"}, theirs, "optimizer_states")
        more = {key: value for key, value in theirs.items() if key not in own and _is_number(value)}  # a schedule's
        numbers = theirs["params"]
        if numbered.keys() & set(numbers):
            raise _MisfitError("optimizer_states")
        numbered |= dict(zip(numbers, own["params"], strict=True))
        groups.append({**settings, **more, "params": list(numbers)})
    kinds: dict[int, Any] = {}
    count = sum(parameter.numel() for parameter in numbered.values())
    states = {}
    for number, state in stored["state"].items():
        parameter = numbered[number]
        if parameter.dim() not in kinds:
            kinds[parameter.dim()] = _state_of_stand_in(module, parameter.dim(), parameter.dtype)
        if state:
            states[number] = _parameter_state(state, parameter, count, kinds[parameter.dim()])
    return {"state": states, "param_groups": groups}


def _state_of_stand_in(module: Any, dimensions: int, dtype: torch.dtype) -> dict[str, Any] | None:
    """What the optimiser keeps of a small parameter after one step; None if that can't be tried."""
    parameter = nn.Parameter(torch.ones(PROBE[:dimensions], dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = module.optimizer([parameter])
        with torch.enable_grad():
            optimizer.step(lambda: torch.zeros(()))
    except Exception:  # for example, it needs sparse gradients
        return None
    return dict(optimizer.state[parameter])


def _parameter_state(
    state: dict[str, Any], parameter: Tensor, numbers: int, kinds: dict[str, Any] | None
) -> dict[str, Any]:
    """The state of one parameter; `numbers` are those of all parameters, which LBFGS keeps in a row."""
    known = kinds or {}
    lacking = {name for name, kind in known.items() if isinstance(kind, Tensor)} - state.keys()
    if lacking:
        raise _MisfitError(f"optimizer_states.{min(lacking)}")
    kept = {}
    for name, value in state.items():
        kind = known.get(name)
        sizes = [tuple(parameter.shape), (), (1,), (numbers,)]
        if isinstance(kind, Tensor) and kind.dim() == parameter.dim():
            # Whole, or (Adafactor) 1 along a dimension. One number on the stand-in is one number here.
            pairs = zip(parameter.shape, kind.shape, PROBE, strict=False)
            sizes = [tuple(size if kept == full else 1 for size, kept, full in pairs)]
        elif isinstance(kind, Tensor) and kind.numel() == 1:
            sizes = [(), (1,)]
        kept[name] = _entry(f"optimizer_states.{name}", value, parameter, kind, sizes)
    return kept


def _entry(place: str, value: Any, parameter: Tensor, kind: Any, sizes: list[tuple[int, ...]]) -> Any:
    if isinstance(kind, Tensor) and _is_number(value):
        value = torch.tensor(value, dtype=kind.dtype)
    if isinstance(value, list):  # of LBFGS
        return [_entry(place, inner, parameter, None, sizes) for inner in value]
    if not isinstance(value, Tensor):
        if value is not None and not _is_number(value):
            raise _MisfitError(place)
        return value
    if tuple(value.shape) not in sizes:
        raise _MisfitError(place)
    if isinstance(kind, Tensor):
        value = value.to(kind.dtype)
    # A count of steps, for example; the products that LBFGS keeps may be negative.
    least = 0 if isinstance(kind, Tensor) else -math.inf
    if value.numel() == 1 and parameter.dim() and parameter.numel() != 1 and not least <= value.item() < math.inf:
        raise _MisfitError(place)
    if value.shape == parameter.shape and value.stride() != parameter.stride():
        # A fused optimiser goes through memory in its parameter's order.
        value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value


def _schedule(stored: Any, scheduler: Any, steps: int) -> dict[str, Any]:
    """How far a schedule of torch's or ours has got; its settings are those of the run."""
    if not type(scheduler).__module__.startswith(SCHEDULES):
        return stored
    own = scheduler.state_dict()
    kept = {key: own[key] for key in NEEDED if key in own}
    for key in PROGRESS & own.keys() & stored.keys():
        kept[key] = _like(own[key], stored[key], f"lr_schedulers.{key}")
    if "_schedulers" in own:
        inner = zip(stored["_schedulers"], scheduler._schedulers, strict=True)
        kept["_schedulers"] = [_schedule(state, one, steps) for state, one in inner]
    if not 0 <= kept.get("last_epoch", 0) <= steps:
        raise _MisfitError("lr_schedulers.last_epoch")
    return kept


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
