"""What kind each setting of a run is: the one table that resuming, compare.py, sweep.py and the records read.

Imports nothing heavy.
"""

from typing import Any, NamedTuple

from cli.flags import DATA_SETS
from errors import shown


class Kind(NamedTuple):
    """What a setting means when runs are compared, continued or searched.

    Attributes:
        parts: compare.py counts runs that differ in it as different.
        kept: A run that is continued must keep it: True, False, or "scheduled" if only a schedule depends on it.
        recipe: It belongs in the recipe that a sweep writes, if it was given.
        fixed: Why a sweep can't search it; empty if it can.
        left_open: The value that leaves it to the machine, in a tuple; empty if there is none.
        default: Its value where a recipe doesn't name it, if that is not off (null, false, 0).
        named: compare.py calls runs by it, if it was changed.
        off: Its values that are the same as none at all; 0 counts as False.
    """

    parts: bool = True
    kept: bool | str = True
    recipe: bool = True
    fixed: str = ""
    left_open: tuple[Any, ...] = ()
    default: Any = None
    named: bool = True
    off: tuple[Any, ...] = (None, False)


SHAPING = Kind()  # decides what is computed
FREE = Kind(kept=False)  # decides what is computed from here on: a run that is continued may change it
EXECUTION = Kind(parts=False, kept=False)  # how it is computed
MACHINE = Kind(parts=False, kept=False, recipe=False)  # where
SAME_TEST = "the trials are compared on the same images"
OTHER_IMAGES = Kind(kept=False, fixed=SAME_TEST, named=False)  # compare.py has a table for each data set
OF_THE_DATA = Kind(named=False)
SAME_IMAGES = "the trials are compared on the same validation images"
# Settings by their dotted names without `init_args`. All others are of the kind of their group.
SETTINGS = {
    "seed_everything": Kind(parts=False, fixed="the seed is no setting to choose by; give --seed N for all trials"),
    "pretrained": SHAPING,
    "class_weights": SHAPING,
    "patience": FREE,
    "stop_at_chance": FREE,
    "model.net.in_channels": OF_THE_DATA,
    "model.net.num_classes": OF_THE_DATA,
    "model.num_classes": OF_THE_DATA,
    "model.net.image_size": Kind(parts=False, recipe=False, fixed="it follows data.image_size"),
    "model.output_bias": Kind(off=(None,)),  # 0 clears the last layer
    "model.scheduler_interval": Kind(default="epoch"),
    "model.initialization": Kind(default="default"),
    "model.compile": EXECUTION,
    "model.checkpoint_activations": EXECUTION,
    "model.channels_last": EXECUTION,
    "model.flip_test": FREE,  # changes nothing in training, but adds an accuracy to the record
    "data.data_dir": MACHINE._replace(fixed=SAME_TEST),
    # Checkpoints name no folder; a run that is continued keeps its classes, whatever their pictures.
    "data.folder": OTHER_IMAGES,
    "data.dataset": OTHER_IMAGES,
    "data.fit": Kind(default="crop"),
    "data.bad_files": Kind(default="skip"),
    "data.channels": Kind(default=1),
    "data.std": Kind(default=1.0),
    "data.num_workers": MACHINE,
    "data.dataset_on_device": MACHINE,
    "data.eval_batch_size": EXECUTION,
    "data.val_size": Kind(fixed=SAME_IMAGES, default=5000, off=(None,)),  # of other pictures null is a tenth
    "data.split_seed": Kind(fixed=SAME_IMAGES),
    "trainer.accelerator": MACHINE,
    "trainer.devices": Kind(kept=False, recipe=False, left_open=("auto",), named=False),  # the machine says it
    "trainer.num_nodes": Kind(kept=False, recipe=False, named=False),
    "trainer.enable_progress_bar": MACHINE,
    "trainer.precision": Kind(kept=False, left_open=(None,), default="32-true"),
    "trainer.accumulate_grad_batches": Kind(default=1),
    "trainer.max_epochs": Kind(kept="scheduled"),
    "trainer.max_steps": Kind(kept="scheduled", default=-1),
    "trainer.max_time": FREE,
    "trainer.gradient_clip_val": FREE,
    "trainer.gradient_clip_algorithm": FREE,
    "trainer.limit_train_batches": Kind(kept="scheduled"),
    # The validation chooses the checkpoint that is tested.
    "trainer.limit_val_batches": Kind(fixed=SAME_IMAGES, off=(None,)),
    "trainer.enable_checkpointing": Kind(kept=False, recipe=False, default=True, off=(None, True)),
    "trainer.min_epochs": FREE,
    "trainer.min_steps": FREE,
    "trainer.sync_batchnorm": FREE,
    "trainer.val_check_interval": FREE,
    "trainer.check_val_every_n_epoch": Kind(kept=False, default=1),
    "trainer.limit_test_batches": FREE,
    "trainer.overfit_batches": Kind(kept="scheduled"),
    "trainer.callbacks": FREE,  # those of recipes are compared separately
}
# What pictures other than Fashion-MNIST's decide where the user does not, and what follows from it.
DECIDED = ("class_names", "channels", "mean", "std", "stored_size")
FOLLOWING = {*(f"data.{name}" for name in DECIDED), "model.num_classes", "model.net.num_classes"}
FOLLOWING.add("model.net.in_channels")
# How a network sees images, and which are held out: a checkpoint that is measured says so, not the recipe.
SEEN = (*DECIDED, "image_size", "fit", "val_size", "test_size", "split_seed")
SAMPLE = "data.sample"  # no setting, but what data_dir held: tests/data's sample of Fashion-MNIST
GROUPS = {"model": SHAPING, "data": SHAPING, "trainer": EXECUTION}


def kind(name: str) -> Kind:
    """The kind of a setting, by its dotted name, with `init_args` or without."""
    name = name.replace(".init_args", "")
    group, dot, _ = name.partition(".")
    return SETTINGS.get(name) or (GROUPS.get(group, MACHINE) if dot else MACHINE)


def is_kept(name: str, scheduled: bool) -> bool:
    """Whether a run that is continued must keep a setting.

    Args:
        name: Dotted name.
        scheduled: Whether the run has a schedule of the learning rate, which is as long as the run.
    """
    kept = kind(name).kept
    return scheduled if kept == "scheduled" else bool(kept)


# Lightning's own names of what may be given in short.
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


def shaping(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that tells runs apart, without the seed, under dotted names.

    What is off is left out, so that older runs still match when a setting is added.
    """
    found = {
        name: without_off(value)
        for name, value in flat(config).items()
        if (of := kind(name)).parts and value not in of.off
    }
    data = config.get("data") or {}
    if (data.get("folder") or data.get("dataset")) and data.get("mean") == 0:  # given: else the pictures decide it
        found["data.mean"] = 0.0
    if found.get("data.val_size") == 0:  # the last weights are tested either way
        found.pop("trainer.enable_checkpointing", None)
    precision = found.get("trainer.precision")
    return found | ({"trainer.precision": PRECISIONS.get(str(precision), precision)} if precision else {})


def of_own_pictures(data: Any) -> list[str]:
    """The flags that name a configuration's own pictures again, as no checkpoint does; none for Fashion-MNIST."""
    data = data if isinstance(data, dict) else {}
    source = shown(str(data["folder"])) if data.get("folder") else data.get("dataset")
    if data.get("folder") and source in DATA_SETS:  # else torchvision's would be meant
        source = f"./{source}"
    flags = ["--data", str(source)] if source else []
    if source and data.get("data_dir", "data") != "data":
        flags += ["--data_dir", shown(str(data["data_dir"]))]
    return flags


def without_off(value: Any) -> Any:
    """The value without what is off (null, false, 0) in mappings, those in lists of callbacks too."""
    if isinstance(value, list):
        return [without_off(one) for one in value]
    if isinstance(value, dict):
        return {name: without_off(one) for name, one in value.items() if one not in (None, False)}
    return value


def flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name and value of everything in nested mappings."""
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def leaves(mapping: dict[str, Any]) -> dict[str, Any]:
    """The same, without `init_args` in the names and without empty mappings."""
    return {name.replace(".init_args", ""): value for name, value in flat(mapping).items() if value != {}}
