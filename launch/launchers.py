"""What torchrun and SLURM say about the processes: adopted if the flags leave it open, else checked against them."""

import os
import re
from typing import Any

from jsonargparse import Namespace

from errors import UserError, count, is_first_process

INTERACTIVE = ("bash", "interactive")  # SLURM's jobs of these names: Lightning starts the processes itself
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order


def take_over_processes(trainer: Namespace) -> None:
    """Set `devices` and `num_nodes` of the Trainer's settings to what the launcher started.

    Without one, a run on one machine is its first and meets where Lightning chooses, whatever the environment says.

    Raises:
        UserError: If the settings or the launcher's variables contradict it; empty on all processes but one.
    """
    try:
        started = _torchrun() or _slurm()
        if started is None:
            if trainer.num_nodes == 1 and "LOCAL_RANK" not in os.environ:
                for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK"):
                    os.environ.pop(name, None)  # left by another job: Lightning would wait for it
            if "MASTER_PORT" in os.environ:
                _number("MASTER_PORT", least=0)
            for name in ("NODE_RANK", "GROUP_RANK"):
                if name in os.environ and _number(name, least=0) >= trainer.num_nodes:
                    raise UserError(
                        f"{name} is {os.environ[name]}, but of --num_nodes {trainer.num_nodes} machines the last is "
                        f"{trainer.num_nodes - 1}; give --num_nodes, or unset {name}"
                    )
            if trainer.num_nodes > 1 and not {"MASTER_ADDR", *RANKS} & os.environ.keys():
                raise UserError(
                    f"--num_nodes {trainer.num_nodes} alone doesn't say where the machines meet: start with "
                    "torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each machine"
                )
            return
        launcher, here, machines = started
        given = _count(trainer.devices)
        if given not in (None, here):
            raise UserError(
                f"{launcher} started {here} process(es) on this machine, but devices={given} was "
                f"given; leave --devices out, or have it start {given} (torchrun --nproc_per_node, srun "
                "--ntasks-per-node)"
            )
        if trainer.num_nodes not in (1, machines):
            raise UserError(
                f"{launcher} started processes on {machines} machine(s), but "
                f"num_nodes={trainer.num_nodes} was given; leave --num_nodes out"
            )
    except UserError as error:
        raise UserError(str(error) if is_first_process() else "") from None
    trainer.num_nodes = machines
    if not isinstance(trainer.devices, list | tuple) and "," not in str(trainer.devices):  # which name the devices
        trainer.devices = here


def check_rank(processes: int) -> None:
    """Refuse a rank that another job left in the environment: the only process would log nothing, as if not the first.

    Args:
        processes: The run's, on all machines.
    """
    name = next((name for name in RANKS if name in os.environ), "")  # which Lightning takes
    if processes == 1 and name and os.environ[name] != "0":
        raise UserError(f"{name} is {os.environ[name]!r}, but this run is one process, of rank 0: unset {name}")


def _torchrun() -> tuple[str, int, int] | None:
    """Launcher, processes on this machine, machines; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here, all_of_them = _number("LOCAL_WORLD_SIZE"), _number("WORLD_SIZE")
    if all_of_them % here:
        raise UserError("torchrun started other numbers of processes on other machines; give all the same")
    return "torchrun", here, all_of_them // here


def _slurm() -> tuple[str, int, int] | None:
    """The same for SLURM; within `salloc` (a job named bash or interactive) Lightning starts the processes itself."""
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    tasks = _number("SLURM_NTASKS")
    if tasks > 1 and not {"SLURM_PROCID", "SLURM_STEP_ID"} <= os.environ.keys():
        raise UserError(
            f"this SLURM job has {tasks} tasks (SLURM_NTASKS), but train.py was not started by srun: write srun python "
            "train.py ..., or ask for --ntasks=1"
        )
    machines = next((_number(name) for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if name in os.environ), 1)
    started = f"SLURM started {count(tasks, 'task')} on {count(machines, 'machine')}"
    if tasks % machines:
        raise UserError(f"{started}; every machine needs as many: --ntasks-per-node")
    for name, most in (("SLURM_PROCID", tasks), ("SLURM_LOCALID", tasks // machines), ("SLURM_NODEID", machines)):
        os.environ.setdefault(name, "0")
        if _number(name, least=0) >= most:
            raise UserError(f"{name} is {os.environ[name]}, but {started}")
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // machines)  # not set by --ntasks alone, but read by Lightning
    os.environ["SLURM_NNODES"] = str(machines)
    return "SLURM", tasks // machines, machines


def _number(name: str, least: int = 1) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"the launcher's variable {name} is {text!r}; a whole number of at least {least} was expected")
    return int(text)


def _count(devices: Any) -> int | None:
    """How many devices the setting names; None if it leaves that open."""
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    if re.fullmatch(r"\d+", text):
        return int(text)
    return len([part for part in text.split(",") if part.strip()]) if "," in text else None
