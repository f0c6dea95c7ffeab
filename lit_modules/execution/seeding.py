"""The seed of each training step, so that a run that is stopped and continued draws what it would have drawn."""

import hashlib
import os

import torch


def seed_step(device: torch.device, epoch: int, batch_idx: int, rank: int) -> None:
    """Seed the device's generator, and the CPU's, from the run's seed, the epoch, the batch and the process."""
    run_seed = os.environ.get("PL_GLOBAL_SEED", "0")  # where seed_everything leaves it
    digest = hashlib.sha256(f"{run_seed} {epoch} {batch_idx} {rank}".encode()).digest()
    seed = int.from_bytes(digest[:7], "big")
    # Not torch.manual_seed, which at each step would format a stack trace for every kind of accelerator that is absent.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
