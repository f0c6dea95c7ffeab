"""The data module, its files, and the whole data set."""

import contextlib
import csv
import errno
import fcntl
import gzip
import hashlib
import json
import logging
import os
import pickle
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tracemalloc
import unicodedata
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchvision
import yaml
from commands import DATA, ENVIRONMENT, REPO, run_forked, whole_set
from conftest import train_once
from filelock import FileLock
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import functional as TF

from checkpoints.trust import Trusted
from cli.flags import DATA_SETS
from datamodules import CLASS_NAMES, DatasetError, FashionMNISTDataModule, PicturesDataModule
from datamodules.batches import EvalBatches, ImageTensors, TrainBatches
from datamodules.files import finding as fashion_mnist_files
from datamodules.files import pictures as picture_files
from datamodules.files import torchvision_sets
from datamodules.files.download import DownloadError, download
from datamodules.files.finding import KNOWN, NAMES, SYSTEM_DIR, load, prepare
from datamodules.files.grounds import _laid, photographed
from datamodules.files.listing import list_folder
from datamodules.files.photographs import saturate, warp
from datamodules.files.pictures import PictureError, find_pictures, read_picture
from errors import Stopped, UserError, run_program
from lit_modules import LitClassifier
from pictures.predict import read_pictures
from weights.exporting import export

# ---- The data module: split, order, batches of several processes, and the pixels, held against torchvision's.


def data_module(stage="fit", **settings):
    data = FashionMNISTDataModule(str(DATA), **{"val_size": 200, "batch_size": 64, **settings})
    data.prepare_data()
    data.setup(stage)
    return data


def in_training(data):
    """The data module with a Trainer that is training."""
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.trainer.training = True
    return data


def sample(count=40):
    images, labels = load(DATA, "train")
    return images[:count, None], labels[:count]


def rows(images):
    """Each image as bytes, so that sets can be compared."""
    return [image.numpy().tobytes() for image in images]


def test_the_split_holds_every_image_once():
    data = data_module()
    assert (len(data.train_set), len(data.val_set)) == (1300, 200)
    everything = sorted(rows(load(DATA, "train")[0]))
    assert sorted(rows(data.train_set.images) + rows(data.val_set.images)) == everything


def test_images_keep_their_labels():
    images, labels = load(DATA, "train")
    label_of = dict(zip(rows(images), labels.tolist(), strict=True))
    for part in (data_module().train_set, data_module().val_set):
        assert [label_of[row] for row in rows(part.images)] == part.labels.tolist()


def test_the_split_depends_on_its_own_seed_alone():
    torch.manual_seed(1)
    first = data_module()
    torch.manual_seed(2)
    again, other = data_module(), data_module(split_seed=1)
    assert torch.equal(first.val_set.images, again.val_set.images)
    assert not torch.equal(first.val_set.images, other.val_set.images)
    assert len(other.val_set) == 200


def test_validate_sees_the_images_that_fit_held_out():
    assert torch.equal(data_module().val_set.images, data_module("validate").val_set.images)


def test_all_images_may_be_trained_on():
    data = in_training(data_module(val_size=0))
    assert (len(data.train_set), len(data.val_set)) == (1500, 0)
    assert data.val_dataloader() == []


@pytest.mark.parametrize("val_size", [1500, 5000])
def test_a_split_that_leaves_nothing_to_train_on(val_size):
    with pytest.raises(DatasetError, match=f"data.val_size={val_size} leaves none of the 1500 training images"):
        data_module(val_size=val_size)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_the_test_images_are_the_official_ones_in_order(stage):
    data = in_training(data_module(stage))
    images, labels = load(DATA, "test")
    loader = data.test_dataloader() if stage == "test" else data.predict_dataloader()
    batches = list(loader)
    assert torch.equal(torch.cat([batch[0] for batch in batches])[:, 0], images)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), labels)
    assert [len(batch[1]) for batch in batches] == [64] * 7 + [52]


def test_loaders_travel_as_bytes_of_the_wanted_size():
    data = in_training(data_module(eval_batch_size=50))
    images, labels = next(iter(data.train_dataloader()))
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (64, 1, 28, 28))
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (64,))
    assert len(next(iter(data.val_dataloader()))[1]) == 50


def test_workers_load_the_same_batches():
    plain, workers = in_training(data_module()), in_training(data_module(num_workers=1))
    assert workers.train_dataloader().num_workers == 1
    for one, other in zip(plain.train_dataloader(), workers.train_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_class_names():
    assert CLASS_NAMES[0] == "T-shirt/top"
    assert CLASS_NAMES[9] == "Ankle boot"
    assert len(set(CLASS_NAMES)) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ({"eval_batch_size": 0}, "data.eval_batch_size=0 must be at least 1"),
        ({"image_size": 0}, "data.image_size=0 must be at least 1"),
        ({"val_size": -1}, "data.val_size=-1 must be at least 0"),
        ({"crop_padding": -1}, "data.crop_padding=-1 must be at least 0"),
        ({"num_workers": -1}, "data.num_workers=-1 must be at least 0"),
        ({"channels": 2}, "data.channels=2 must be 1 or 3"),
        ({"std": 0.0}, "data.std=0.0 must be a positive number"),
        ({"std": float("nan")}, "data.std=nan must be a positive number"),
        ({"mean": float("nan")}, "data.mean=nan must be a finite number"),
        ({"brightness": 1.5}, "data.brightness=1.5 must lie between 0 and 1"),
        ({"contrast": float("nan")}, "data.contrast=nan must lie between 0 and 1"),
        ({"random_erasing": -0.1}, "data.random_erasing=-0.1 must lie between 0 and 1"),
        ({"photographed": 1.1}, "data.photographed=1.1 must lie between 0 and 1"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        FashionMNISTDataModule(**settings)


# --- the order of the samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 5, 96, 97, 100, 101, 103])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_training_shows_each_image_once(world_size, count, batch_size):
    samplers = [TrainBatches(count, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(own) for own in batches} == {len(sampler) for sampler in samplers} == {len(batches[0])}
    assert all(0 < len(batch) <= batch_size + 2 * (batch_size > 1) for own in batches for batch in own)
    if batch_size > 1 and count >= 2 * world_size:  # none of one image, with which batch normalisation can't train
        assert min(len(batch) for own in batches for batch in own) > 1
    seen = [index for own in batches for batch in own for index in batch.tolist()]
    assert set(seen) == set(range(count))
    # Only where there are fewer images than processes does one stand in for the missing.
    last = count % (batch_size * world_size) if batch_size == 1 else count
    stand_ins = world_size - last if 0 < last < world_size else 0
    assert len(seen) == count + stand_ins


def test_processes_share_the_global_batches_of_one():
    one = list(TrainBatches(104, 12))
    for world_size in (2, 3, 4):
        parts = [list(TrainBatches(104, 12 // world_size, rank, world_size)) for rank in range(world_size)]
        for whole, *pieces in zip(one, *parts, strict=True):
            assert sorted(whole.tolist()) == sorted(torch.cat(pieces).tolist())


def test_the_order_changes_with_epoch_and_seed(monkeypatch):
    def order(epoch, seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return tuple(torch.cat(list(TrainBatches(50, 7, position=lambda: (epoch, 0)))).tolist())

    orders = {(epoch, seed): order(epoch, seed) for epoch in range(3) for seed in range(3)}
    assert len(set(orders.values())) == 9
    assert orders == {(epoch, seed): order(epoch, seed) for epoch, seed in orders}
    assert order(0, 0) != tuple(range(50))


def test_a_continued_epoch_shows_the_rest():
    whole = list(TrainBatches(50, 7, position=lambda: (4, 0)))
    rest = list(TrainBatches(50, 7, position=lambda: (4, 3)))
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[3:]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 5, 96, 97, 100])
def test_evaluation_shows_each_image_exactly_once(world_size, count):
    images = ImageTensors(torch.arange(count).to(torch.uint8)[:, None, None].expand(-1, 28, 28), torch.arange(count))
    samplers = [EvalBatches(count, 8, rank, world_size) for rank in range(world_size)]
    labels = [[images.__getitems__(batch)[1] for batch in sampler] for sampler in samplers]
    assert {len(own) for own in labels} == {len(sampler) for sampler in samplers} == {len(labels[0])}
    every = torch.cat([batch for own in labels for batch in own])
    assert sorted(every[every != -100].tolist()) == list(range(count))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_evaluation_deals_out_the_batches_of_one_process(world_size):
    one = [batch.tolist() for batch in EvalBatches(100, 8)]
    dealt = [[batch.tolist() for batch in EvalBatches(100, 8, rank, world_size)] for rank in range(world_size)]
    turns = [batch for turn in zip(*dealt, strict=True) for batch in turn if batch]
    assert turns == one


# --- the pixels -----------------------------------------------------------------------------------------------------


def pil_reference(image, size):
    """torchvision's way: resize as a PIL image, then scale to 0..1."""
    return TF.to_tensor(TF.resize(Image.fromarray(image[0].numpy()), [size, size]))


@pytest.mark.parametrize("size", [7, 14, 20, 28, 32, 56, 96, 224])
def test_resizing_is_pils(size):
    images, labels = sample()
    data = FashionMNISTDataModule(image_size=size)
    pixels, same = data.on_after_batch_transfer((images, labels), 0)
    expected = torch.stack([pil_reference(image, size) for image in images])
    assert pixels.dtype == torch.float32
    assert torch.equal(same, labels)
    assert (pixels - expected).abs().max() <= 1.001 / 255  # PIL rounds to 8 bits


def test_pixels_of_28_are_only_scaled():
    images, labels = sample()
    pixels, _ = FashionMNISTDataModule().on_after_batch_transfer((images, labels), 0)
    assert torch.equal(pixels, images / 255)


def test_normalisation():
    images, labels = sample()
    data = FashionMNISTDataModule(mean=0.25, std=0.5, image_size=32)
    plain, _ = FashionMNISTDataModule(image_size=32).on_after_batch_transfer((images, labels), 0)
    pixels, _ = data.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(pixels, (plain - 0.25) / 0.5)


def test_three_channels_repeat_the_grey_one():
    images, labels = sample()
    data = FashionMNISTDataModule(channels=3, image_size=30)
    pixels, _ = data.on_after_batch_transfer((images, labels), 0)
    grey, _ = FashionMNISTDataModule(image_size=30).on_after_batch_transfer((images, labels), 0)
    assert data.input_shape == (3, 30, 30) == tuple(pixels.shape[1:])
    assert all(torch.equal(pixels[:, channel], grey[:, 0]) for channel in range(3))


AUGMENTATIONS: dict[str, Any] = {
    "crop_padding": 2,
    "horizontal_flip": True,
    "brightness": 0.4,
    "contrast": 0.4,
    "random_erasing": 0.5,
    "photographed": 0.5,
}


def test_only_training_images_are_augmented():
    images, labels = sample()
    data = in_training(FashionMNISTDataModule(**AUGMENTATIONS))
    assert not torch.equal(data.on_after_batch_transfer((images, labels), 0)[0], images / 255)
    for stage in ("validating", "testing", "predicting"):
        setattr(data.trainer, stage, True)
        assert torch.equal(data.on_after_batch_transfer((images, labels), 0)[0], images / 255)


def test_the_given_batch_is_left_alone():
    images, labels = sample()
    before = images.clone()
    in_training(FashionMNISTDataModule(**AUGMENTATIONS, mean=0.3)).on_after_batch_transfer((images, labels), 0)
    assert torch.equal(images, before)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_shift_and_flip_is_torchvisions_pad_crop_hflip(padding, flip):
    images, labels = sample(100)
    data = in_training(FashionMNISTDataModule(crop_padding=padding, horizontal_flip=flip))
    torch.manual_seed(5)
    pixels, _ = data.on_after_batch_transfer((images, labels), 0)

    torch.manual_seed(5)
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, 100, 1))[:, :, 0].tolist()
    kept = (torch.rand(100) < 0.5).tolist() if flip else [True] * 100
    expected = []
    for image, top, left, keep in zip(images, tops, lefts, kept, strict=True):
        cropped = TF.crop(TF.pad(image, [padding] * 4), top, left, 28, 28)
        expected.append(cropped if keep else TF.hflip(cropped))
    assert torch.equal(pixels, torch.stack(expected) / 255)
    if padding:
        assert set(tops) == set(lefts) == set(range(2 * padding + 1))
    if flip:
        assert 30 < sum(kept) < 70


@pytest.mark.parametrize(("brightness", "contrast"), [(0.6, 0.0), (0.0, 0.9), (0.3, 0.5)])
def test_jitter_is_torchvisions(brightness, contrast):
    images, labels = sample(100)
    images = images // 2  # so dark that torchvision's clamp between the two steps does nothing
    data = in_training(FashionMNISTDataModule(brightness=brightness, contrast=contrast))
    torch.manual_seed(6)
    pixels, _ = data.on_after_batch_transfer((images, labels), 0)

    torch.manual_seed(6)
    draws = 2 * torch.rand(2, 100) - 1
    expected = []
    for image, bright, contrasted in zip(images / 255, *draws, strict=True):
        image = TF.adjust_brightness(image, float(1 + brightness * bright))
        expected.append(TF.adjust_contrast(image, float(1 + contrast * contrasted)))
    torch.testing.assert_close(pixels, torch.stack(expected))
    assert (pixels - images / 255).abs().amax(dim=(1, 2, 3)).gt(0.01).sum() > 80


def test_jitter_stays_within_the_range_of_pixels():
    images, labels = sample(100)
    data = in_training(FashionMNISTDataModule(brightness=1.0, contrast=1.0))
    pixels, _ = data.on_after_batch_transfer((images, labels), 0)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_random_erasing_fills_one_rectangle():
    count = 4000
    data = in_training(FashionMNISTDataModule(random_erasing=0.4))
    erased = []
    for value in (0, 255):  # with the same draws; a random pixel may be equal to one of the two, not to both
        torch.manual_seed(8)
        images = torch.full((count, 1, 28, 28), value, dtype=torch.uint8)
        pixels = data.on_after_batch_transfer((images, torch.zeros(count)), 0)[0][:, 0]
        erased.append(pixels != value / 255)
    inside = erased[0] | erased[1]
    chosen = inside.flatten(1).any(dim=1)
    assert chosen.float().mean() == pytest.approx(0.4, abs=0.03)

    inside, pixels = inside[chosen], pixels[chosen]
    rows, columns = inside.any(dim=2), inside.any(dim=1)
    height, width = rows.sum(dim=1), columns.sum(dim=1)
    area = inside.sum(dim=(1, 2))
    assert torch.equal(inside, rows[:, :, None] & columns[:, None])  # and without gaps:
    for line in (rows, columns):
        assert (line.int().diff(dim=1).abs().sum(dim=1) + line[:, 0] + line[:, -1] == 2).all()
        often = line.float().mean(dim=0)  # everywhere in the image, no side preferred
        assert often.min() > 0.05
        assert (often - often.flip(0)).abs().max() < 0.1
    assert area.min() >= 0.015 * 784  # sides are rounded to whole pixels
    assert area.max() <= 0.35 * 784
    assert (area / 784).mean() == pytest.approx(0.175, abs=0.01)
    aspect = height / width
    assert 0.2 < aspect.min() < 0.35
    assert 2.8 < aspect.max() < 4.5
    assert aspect.log().mean() == pytest.approx(0, abs=0.05)
    assert pixels[inside].mean() == pytest.approx(0.5, abs=0.01)
    assert pixels[inside].unique().numel() == 256


def test_augmented_images_are_resized_afterwards():
    images, labels = sample()
    data = in_training(FashionMNISTDataModule(crop_padding=3, horizontal_flip=True, image_size=56))
    torch.manual_seed(7)
    pixels, _ = data.on_after_batch_transfer((images, labels), 0)
    torch.manual_seed(7)
    small, _ = in_training(FashionMNISTDataModule(crop_padding=3, horizontal_flip=True)).on_after_batch_transfer(
        (images, labels), 0
    )
    expected = torch.stack([pil_reference((image * 255).round().to(torch.uint8), 56) for image in small])
    assert (pixels - expected).abs().max() <= 1.001 / 255


# ---- The files of Fashion-MNIST: every source, every fault that has been seen, with real processes and a real server.
SAMPLE = Path(__file__).parent / "data"
GZ_NAMES = [f"{name}.gz" for name in NAMES]
LOCK = ".fashion-mnist.lock"
SAMPLE_SIZES: dict[Literal["train", "test"], int] = {"train": 1500, "test": 500}
FULL_SIZES: dict[Literal["train", "test"], int] = {"train": 60_000, "test": 10_000}


class Server(ThreadingHTTPServer):
    """Serves the sample; the first part of the path says how: /healthy/NAME.gz, /stalled/NAME.gz, ..."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.stopped = threading.Event()

    def mirror(self, manner: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{manner}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        manner, name = self.path.strip("/").split("/", 1)
        self.server.requests[name] += 1
        with contextlib.suppress(ConnectionError):  # the client may walk away
            getattr(self, manner)((SAMPLE / name).read_bytes() if (SAMPLE / name).is_file() else b"")

    def log_message(self, *arguments):
        pass

    def head(self, length: int):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def healthy(self, data):
        self.head(len(data))
        self.wfile.write(data)

    def late(self, data):
        self.server.stopped.wait(0.2)
        self.healthy(data)

    def slow(self, data):
        data = data[:70_000]
        self.head(len(data))
        for start in range(0, len(data), 8_000):
            self.server.stopped.wait(0.2)
            self.wfile.write(data[start : start + 8_000])

    def stalled(self, data):
        self.server.stopped.wait(60)

    def stalled_half_way(self, data):
        self.head(len(data))
        self.wfile.write(data[: len(data) // 2])
        self.server.stopped.wait(60)

    def drip(self, data):
        self.head(len(data))
        for byte in data[:400]:  # 8 seconds
            self.server.stopped.wait(0.02)
            self.wfile.write(bytes([byte]))

    def drip_headers(self, data):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Drip: ")
        for _ in range(400):
            self.server.stopped.wait(0.02)
            self.wfile.write(b".")

    def endless(self, data):
        self.send_response(200)
        self.end_headers()
        while not self.server.stopped.is_set():
            self.wfile.write(bytes(1 << 16))

    def cut_off(self, data):
        self.head(len(data))
        self.wfile.write(data[: len(data) // 2])

    def truncated(self, data):
        self.healthy(data[: len(data) // 2])

    def wrong(self, data):
        self.healthy(gzip.compress(one_bit_changed(gzip.decompress(data)), compresslevel=1))

    def web_page(self, data):
        self.healthy(b"<!DOCTYPE html><title>Please log in</title>")

    def unpacked(self, data):
        self.healthy(gzip.decompress(data))

    def absent(self, data):
        self.send_error(404)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.stopped.set()
        server.shutdown()


def one_bit_changed(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def put_sample(folder: Path, *, raw: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        data = (SAMPLE / f"{name}.gz").read_bytes()
        (folder / (name if name in raw else f"{name}.gz")).write_bytes(gzip.decompress(data) if name in raw else data)
    return folder


def prepare_sample(
    folder: Path, *mirrors: str, timeout: float = 10.0, system_dir: Path = Path("/nonexistent"), **kwargs
):
    return prepare(folder, data_set="sample", mirrors=mirrors, timeout=timeout, system_dir=system_dir, **kwargs)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


def check_sample(folder: Path):
    for split, size in SAMPLE_SIZES.items():
        images, labels = load(folder, split)
        assert (images.shape, images.dtype) == ((size, 28, 28), torch.uint8)
        assert (labels.shape, labels.dtype) == ((size,), torch.int64)
        assert labels.bincount().tolist() == [size // 10] * 10


# Reading what is there


@pytest.mark.parametrize("raw", [(), NAMES, NAMES[1:3]], ids=["gz", "raw", "mixture"])
def test_files_in_data_dir_are_used_and_nothing_is_written(tmp_path, raw):
    folder = put_sample(tmp_path, raw=raw)
    before = sorted(tmp_path.iterdir())
    assert prepare(folder, mirrors=()) == folder
    check_sample(folder)
    assert sorted(tmp_path.iterdir()) == before


def test_sample_is_the_start_of_each_class_of_the_full_set():
    full = full_set()
    for split, size in SAMPLE_SIZES.items():
        per_class = size // 10
        (images, labels), (few_images, few_labels) = load(full, split), load(SAMPLE, split)
        for label in range(10):
            assert images[labels == label][:per_class].equal(few_images[few_labels == label])


def test_full_set():
    full = full_set()
    assert prepare(full, mirrors=()) == full
    for split, size in FULL_SIZES.items():
        images, labels = load(full, split)
        assert (images.shape, images.dtype) == ((size, 28, 28), torch.uint8)
        assert labels.bincount().tolist() == [size // 10] * 10


def full_set() -> Path:
    for folder in (REPO / "data", SYSTEM_DIR):
        if all((folder / name).is_file() for name in GZ_NAMES):
            return folder
    pytest.skip(f"neither {REPO / 'data'} nor {SYSTEM_DIR} holds the full data set")


def test_torchvision_folder_and_system_folder_are_used_in_this_order(tmp_path):
    system = put_sample(tmp_path / "system")
    data_dir = tmp_path / "data"
    assert prepare_sample(data_dir, system_dir=system) == system
    assert not data_dir.exists()
    torchvision = put_sample(data_dir / "FashionMNIST" / "raw", raw=NAMES)
    assert prepare_sample(data_dir, system_dir=system) == torchvision
    check_sample(torchvision)
    (torchvision / NAMES[0]).write_bytes(b"damaged")
    assert prepare_sample(data_dir, system_dir=system) == system
    assert names_in(torchvision) == sorted(NAMES)  # that folder is not ours to change


def test_unpacked_file_under_gz_name_is_read(tmp_path):
    folder = put_sample(tmp_path)
    (folder / GZ_NAMES[0]).write_bytes(gzip.decompress((SAMPLE / GZ_NAMES[0]).read_bytes()))
    assert prepare_sample(folder) == folder
    check_sample(folder)


def test_file_compressed_anew_is_good(tmp_path):
    folder = put_sample(tmp_path)
    content = gzip.decompress((SAMPLE / GZ_NAMES[0]).read_bytes())
    (folder / GZ_NAMES[0]).write_bytes(gzip.compress(content, compresslevel=0))
    assert prepare_sample(folder) == folder
    check_sample(folder)


# Wrong files


def test_different_data_sets_are_not_mixed(tmp_path, monkeypatch):
    folder = put_sample(tmp_path, raw=NAMES)
    other = {}
    for name in NAMES:
        content = one_bit_changed((folder / name).read_bytes())
        other[name] = (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(KNOWN, "other", other)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(one_bit_changed(labels.read_bytes()))
    with pytest.raises(DatasetError, match=r"one data set, but holds .*train-labels-idx1-ubyte \(other\)") as caught:
        prepare_sample(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match="mixes images and labels"):
        load(folder, "train")
    assert names_in(folder) == sorted(NAMES)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_another_set_of_the_same_format_is_refused_and_left_alone(tmp_path, ending):
    """MNIST's files have the same names and lengths."""
    for name in NAMES:
        content = one_bit_changed(gzip.decompress((SAMPLE / f"{name}.gz").read_bytes()))
        (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(DatasetError, match=r"holds another data set in the same format \(MNIST\?\): choose another"):
        prepare_sample(tmp_path, system_dir=SAMPLE)
    assert names_in(tmp_path) == sorted(f"{name}{ending}" for name in NAMES)


def test_part_of_the_sample_is_not_filled_up_with_the_full_set(tmp_path):
    folder = put_sample(tmp_path / "data")
    (folder / GZ_NAMES[0]).unlink()
    with pytest.raises(DatasetError, match="has to hold the 4 files of one data set"):
        prepare(folder, system_dir=put_sample(tmp_path / "system"), mirrors=())


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


BAD = {
    "truncated": (truncated, "is truncated"),
    "flipped byte": (flipped, "is damaged"),
    "empty": (lambda data: b"", "holds 0 bytes instead of 47,040,016"),
    "wrong content": (lambda data: gzip.compress(one_bit_changed(gzip.decompress(data))), "wrong content"),
    "a web page": (lambda data: b"<!DOCTYPE html>", "holds 15 bytes instead of"),
    "too long": (lambda data: gzip.compress(bytes(47_040_017)), "holds more than the 47,040,016 bytes"),
}


@pytest.mark.parametrize(("spoil", "problem"), BAD.values(), ids=BAD.keys())
def test_bad_file_is_named_set_aside_and_fetched_again(tmp_path, server, caplog, spoil, problem):
    folder = put_sample(tmp_path)
    bad = folder / GZ_NAMES[0]
    content = spoil(bad.read_bytes())
    bad.write_bytes(content)
    with pytest.raises(DatasetError, match=problem):
        load(folder, "train")
    assert prepare_sample(folder, server.mirror("healthy")) == folder
    check_sample(folder)
    assert server.requests == {GZ_NAMES[0]: 1}
    assert (folder / f"{GZ_NAMES[0]}.corrupt").read_bytes() == content
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert str(bad) in message
    assert problem in message
    assert "\n" not in message


def test_earlier_corrupt_files_are_kept(tmp_path, server):
    folder = put_sample(tmp_path)
    for content in (b"one", b"two", b"three"):
        (folder / GZ_NAMES[0]).write_bytes(content)
        prepare_sample(folder, server.mirror("healthy"))
    kept = [(folder / f"{GZ_NAMES[0]}.corrupt{suffix}").read_bytes() for suffix in ("", "-2", "-3")]
    assert kept == [b"one", b"two", b"three"]
    assert names_in(folder) == sorted([*GZ_NAMES, *(f"{GZ_NAMES[0]}.corrupt{suffix}" for suffix in ("", "-2", "-3"))])


def test_bad_raw_file_does_not_hide_a_good_gz(tmp_path, caplog):
    folder = put_sample(tmp_path)
    (folder / NAMES[0]).write_bytes(b"bad")
    check_sample(folder)
    assert prepare_sample(folder) == folder
    assert names_in(folder) == sorted([*GZ_NAMES, f"{NAMES[0]}.corrupt"])


def test_gzip_bomb_takes_no_memory():
    bomb = gzip.compress(bytes(200_000_000), compresslevel=1)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="holds more than the 60,008 bytes"):
            fashion_mnist_files._verify("train-labels-idx1-ubyte", bomb)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


IMAGE_HEADER = bytes((0, 0, 8, 3))
MALFORMED = {
    "empty": (b"", (28, 28), "not an IDX file"),
    "no dimensions": (IMAGE_HEADER + bytes(11), (28, 28), "not an IDX file"),
    "floats": (bytes((0, 0, 0x0D, 3)) + struct.pack(">3I", 1, 28, 28) + bytes(784), (28, 28), "not an IDX file"),
    "labels for images": (bytes((0, 0, 8, 1)) + struct.pack(">I", 1) + bytes(1), (28, 28), "not an IDX file"),
    "32x32": (IMAGE_HEADER + struct.pack(">3I", 1, 32, 32) + bytes(1024), (28, 28), "the header says"),
    "too short": (IMAGE_HEADER + struct.pack(">3I", 2, 28, 28) + bytes(784), (28, 28), "the header says"),
    "too long": (IMAGE_HEADER + struct.pack(">3I", 1, 28, 28) + bytes(785), (28, 28), "the header says"),
    "no items": (IMAGE_HEADER + struct.pack(">3I", 0, 28, 28), (28, 28), "the header says"),
    "label 10": (bytes((0, 0, 8, 1)) + struct.pack(">I", 2) + bytes((3, 10)), (), "a label is 10"),
}


@pytest.mark.parametrize(("content", "shape", "problem"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_idx_is_refused(content, shape, problem):
    with pytest.raises(ValueError, match=problem):
        fashion_mnist_files._parse_idx(content, shape)


def test_missing_file_is_named_by_load(tmp_path):
    with pytest.raises(DatasetError, match=r"holds neither train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz"):
        load(tmp_path, "train")


# Downloading


def test_healthy_server_fills_an_empty_folder_silently(tmp_path, server, capfd):
    folder = tmp_path / "new" / "data"
    assert prepare_sample(folder, server.mirror("healthy")) == folder
    check_sample(folder)
    assert names_in(folder) == sorted(GZ_NAMES)
    assert server.requests == dict.fromkeys(GZ_NAMES, 1)
    assert capfd.readouterr() == ("", "")


def test_server_that_unpacks_is_understood(tmp_path, server):
    prepare_sample(tmp_path, server.mirror("unpacked"))
    check_sample(tmp_path)
    assert names_in(tmp_path) == sorted(NAMES)


def test_slow_but_steady_server_may_take_longer_than_the_timeout(server):
    start = time.monotonic()
    data = download(server.mirror("slow") + "t10k-images-idx3-ubyte.gz", limit=10**6, timeout=1.5)
    assert time.monotonic() - start > 1.5
    assert data == (SAMPLE / "t10k-images-idx3-ubyte.gz").read_bytes()[:70_000]


@pytest.mark.parametrize("manner", ["stalled", "stalled_half_way", "drip", "drip_headers"])
def test_server_without_progress_is_given_up(server, manner):
    start = time.monotonic()
    # "stalled_half_way" sends half of the file at once, and then has to be given up all the same.
    with pytest.raises(DownloadError, match=r"stalled: less than 6,000 bytes in 0\.6 s"):
        download(server.mirror(manner) + GZ_NAMES[0], limit=10**6, timeout=0.6)
    assert 0.5 < time.monotonic() - start < 5


def test_endless_answer_is_cut(server):
    with pytest.raises(DownloadError, match="more than the 100,000 bytes expected"):
        download(server.mirror("endless") + GZ_NAMES[0], limit=100_000, timeout=10)


FAULTS = {
    "absent": "HTTP 404 Not Found",
    "stalled": "stalled",
    "drip": "stalled",
    "cut_off": "is truncated",
    "truncated": "is truncated",
    "wrong": "right length but wrong content",
    "web_page": "bytes instead of",
}


@pytest.mark.parametrize(("manner", "problem"), FAULTS.items())
def test_second_mirror_replaces_a_faulty_first(tmp_path, server, caplog, manner, problem):
    prepare_sample(tmp_path, server.mirror(manner), server.mirror("healthy"), timeout=1.5)
    check_sample(tmp_path)
    assert names_in(tmp_path) == sorted(GZ_NAMES)
    # Only the first file is asked for twice: the mirror that failed is the last choice from then on.
    assert server.requests == {GZ_NAMES[0]: 2} | dict.fromkeys(GZ_NAMES[1:], 1)
    [record] = caplog.records
    assert server.mirror(manner) + GZ_NAMES[0] in record.getMessage()
    assert problem in record.getMessage()


def test_dead_mirror_and_unknown_host_are_passed_over(tmp_path, server):
    with Server() as gone:
        dead = gone.mirror("healthy")  # bound, but closed before the download: connection refused
    prepare_sample(tmp_path, dead, "http://host.invalid/", server.mirror("healthy"))
    check_sample(tmp_path)


def test_sample_from_a_mirror_is_not_taken_for_the_full_set(tmp_path, server, caplog):
    with pytest.raises(DatasetError, match="could not be fetched"):
        prepare(tmp_path, system_dir=SAMPLE, mirrors=[server.mirror("healthy")], timeout=5)
    assert "belongs to the sample data set, not to the full one" in caplog.text
    assert names_in(tmp_path) == []


def test_nothing_works(tmp_path, server, caplog):
    system = put_sample(tmp_path / "system")
    (system / GZ_NAMES[3]).unlink()
    data_dir = tmp_path / "data"
    with pytest.raises(DatasetError, match="could not be fetched") as caught:
        prepare_sample(data_dir, server.mirror("absent"), server.mirror("wrong"), timeout=5, system_dir=system)
    assert f"{data_dir} holds 0 of its 4 files, {data_dir / 'FashionMNIST' / 'raw'} 0, {system} 3" in str(caught.value)
    assert f"{server.mirror('absent')}{GZ_NAMES[0]}: HTTP 404 Not Found" in caplog.text
    assert f"{server.mirror('wrong')}{GZ_NAMES[0]}: has the right length but wrong content" in caplog.text
    assert server.requests == {GZ_NAMES[0]: 4}  # two attempts at each
    assert names_in(data_dir) == []


def _offline() -> None:
    os.environ |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # which lead nowhere
    prepare.__kwdefaults__ = {**(prepare.__kwdefaults__ or {}), "system_dir": Path("/nonexistent")}


def test_who_is_offline_reads_one_line_with_three_ways_out(tmp_path):
    answer = run_forked("--model=lenet", "--data_dir=empty", folder=tmp_path, prepare=_offline)
    *mirrors, line = answer.err.splitlines()
    assert answer.code == 2 and line.startswith("train.py: error: Fashion-MNIST was not found and could not be fetched")
    assert len(mirrors) == 3 and all("Connection refused" in mirror for mirror in mirrors)
    assert "\\n" not in line and len(line) < 420
    for way in ("get online", "copy its four .gz files", "sudo apt install"):
        assert way in line


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(DatasetError, match="is a file, but a folder is expected"):
        prepare_sample(tmp_path / "data", system_dir=put_sample(tmp_path / "system"))


@pytest.mark.parametrize("data", [FashionMNISTDataModule(str(DATA / "README.md")), PicturesDataModule("nowhere")])
def test_any_program_says_in_one_line_that_there_are_no_such_pictures(data, capsys):
    assert run_program("own", lambda: data.setup("fit")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("own: error: ") and ("a folder is expected" in line or "nowhere" in line)


# Other processes. The package's __init__ imports Lightning, which takes seconds and is not needed here.
PRELUDE = """
import os, sys, types
from pathlib import Path
package = types.ModuleType("datamodules")
package.__path__ = ["datamodules"]
sys.modules["datamodules"] = package
from datamodules.files.finding import DatasetError, load, prepare

def attempt(data_dir, *mirrors, system_dir="/nonexistent", **kwargs):
    try:
        return prepare(Path(data_dir), data_set="sample", mirrors=mirrors, system_dir=Path(system_dir), **kwargs)
    except DatasetError as error:
        return f"DatasetError: {error}"

"""


def python(code: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    kwargs = {"stderr": subprocess.PIPE, **kwargs}
    return subprocess.run(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, **kwargs)


def test_four_processes_prepare_one_folder_at_once(tmp_path, server):
    folder = tmp_path / "data"
    put_sample(folder)
    for name in GZ_NAMES:
        (folder / name).write_bytes(b"bad")
    code = """
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        result = attempt(*sys.argv[1:])
        load(result, "train"), load(result, "test")
        os.write(1, f"{result}\\n".encode())
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""
    done = python(code, folder, server.mirror("late"))
    assert done.stdout.splitlines() == [str(folder)] * 4, done.stderr
    assert server.requests == dict.fromkeys(GZ_NAMES, 1)
    assert done.stderr.count("set aside") == 4
    assert names_in(folder) == sorted([*GZ_NAMES, *(f"{name}.corrupt" for name in GZ_NAMES)])


@pytest.mark.parametrize("mended", [False, True], ids=["set aside", "replaced"])
def test_bad_files_that_another_process_deals_with_meanwhile(tmp_path, server, monkeypatch, mended):
    for name in GZ_NAMES:
        (tmp_path / name).write_bytes(b"bad")
    read = fashion_mnist_files._read

    def late(path: Path, name: str) -> bytes:
        if path.read_bytes() != b"bad":
            return read(path, name)
        path.unlink()
        if not mended:
            return read(path, name)
        path.write_bytes((SAMPLE / path.name).read_bytes())
        return b"bad"

    monkeypatch.setattr(fashion_mnist_files, "_read", late)
    assert prepare_sample(tmp_path, server.mirror("healthy")) == tmp_path
    check_sample(tmp_path)
    assert server.requests == ({} if mended else dict.fromkeys(GZ_NAMES, 1))


@pytest.fixture
def open_tmp_path():
    """A temporary folder that another user may enter, which pytest's is not."""
    before = os.umask(0o022)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
    os.umask(before)


def test_read_only_folder(open_tmp_path):
    good, bad, system = (put_sample(open_tmp_path / name) for name in ("good", "bad", "system"))
    (bad / GZ_NAMES[0]).write_bytes(b"bad")
    for folder in (good, bad):
        folder.chmod(0o555)
    code = """
if os.geteuid() == 0:  # no mode keeps root from writing
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
good, bad, system = sys.argv[1:]
print(attempt(good))
print(len(load(good, "train")[1]))
print(attempt(bad, system_dir=system))
print(attempt(bad))
print(attempt(bad + "/new"))
"""
    done = python(code, good, bad, system)
    outcomes = done.stdout.splitlines()
    assert outcomes[:3] == [str(good), "1500", str(system)], done.stderr
    for outcome, folder in zip(outcomes[3:], (bad, bad / "new"), strict=True):
        assert outcome.startswith(f"DatasetError: Fashion-MNIST cannot be stored in {folder} (Permission denied): ")
    warning = f"{bad / GZ_NAMES[0]} holds 3 bytes instead of 47,040,016; it cannot be set aside (Permission denied)"
    assert done.stderr.splitlines() == [warning] * 2
    assert sorted(path.name for path in good.iterdir()) == sorted(GZ_NAMES)


@pytest.mark.filterwarnings("ignore:flock not supported on this filesystem")  # filelock's, which has a way of its own
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_holds_the_data(tmp_path, server, monkeypatch, number):
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (put_sample(tmp_path / "data") / GZ_NAMES[0]).write_bytes(b"bad")
    assert prepare_sample(tmp_path / "data", server.mirror("healthy")) == tmp_path / "data"
    check_sample(tmp_path / "data")
    assert (tmp_path / "data" / f"{GZ_NAMES[0]}.corrupt").read_bytes() == b"bad"
    assert len(of_folder(put_classes(tmp_path / "own", cat=6, dog=6), tmp_path).train_set)


def test_file_that_another_process_has_just_replaced_is_not_set_aside(tmp_path, caplog):
    folder = put_sample(tmp_path)
    (folder / GZ_NAMES[0]).write_bytes(b"bad")
    with FileLock(folder / LOCK):
        waiting = threading.Thread(target=prepare_sample, args=(folder,))
        waiting.start()
        time.sleep(0.3)  # it has seen the bad file and waits for the lock
        put_sample(folder)
    waiting.join()
    assert caplog.records == []
    assert names_in(folder) == sorted(GZ_NAMES)


def test_process_killed_while_writing_leaves_no_file_under_its_final_name(tmp_path, server):
    code = """
import resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # kills in the midst of a write
attempt(*sys.argv[1:])
"""
    assert python(code, tmp_path, server.mirror("healthy")).returncode == -signal.SIGXFSZ
    [leftover] = names_in(tmp_path)
    assert leftover.startswith(f".{GZ_NAMES[0]}.")
    assert prepare_sample(tmp_path, server.mirror("healthy")) == tmp_path
    check_sample(tmp_path)


def test_full_disk(tmp_path, server):
    # A limit on the size of files makes a write fail half-way, just as a full disk does.
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
print(attempt(*sys.argv[1:]))
"""
    done = python(code, tmp_path, server.mirror("healthy"))
    assert done.stdout.startswith(f"DatasetError: Fashion-MNIST cannot be stored in {tmp_path} (File too large): ")
    assert done.stdout.count("\n") == 1
    assert names_in(tmp_path) == []


def terminal() -> tuple[int, int]:
    """The two ends of a terminal of 24 lines, 120 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    return ours, theirs


def test_progress_bar_on_a_terminal(tmp_path, server):
    ours, theirs = terminal()
    done = python("attempt(*sys.argv[1:])", tmp_path, server.mirror("healthy"), stderr=theirs)
    os.close(theirs)
    shown = b""  # a piece may end within a character
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 100_000):
            shown += piece
    os.close(ours)
    assert done.returncode == 0
    for name in GZ_NAMES:
        assert f"{name}: 100%" in shown.decode()


# ---- The full data set: an accuracy that only a working pipeline reaches.


@pytest.mark.slow
def test_lenet_learns_fashion_mnist(tmp_path_factory):
    folder = whole_set()
    if folder is None:
        pytest.skip(f"the full data set lies neither in data/ nor in {SYSTEM_DIR}")
    run = train_once("full", tmp_path_factory, "--model=lenet", "--max_epochs=2", f"--data_dir={folder}")
    assert run.answer.err == ""
    found = json.loads((run.folder / "record.json").read_text())
    assert (found["train_images"], found["val_images"], found["test"]["images"]) == (55_000, 5_000, 10_000)
    assert found["best_val_accuracy"] > 0.85
    assert found["test"]["accuracy"] > 0.84
    assert abs(found["test"]["accuracy"] - found["best_val_accuracy"]) < 0.03  # the split is fair


# ---- Folders of one's own pictures: listed, split, decoded, and refused in one line.

PHOTOS = REPO / "tests" / "data" / "photos"
CLASSES = ["dress", "hat", "pants", "shoes"]


def draw(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30), **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **how)
    return path


def put_classes(folder: Path, **counts: int) -> Path:
    """Pictures of one colour each, all different."""
    for shade, (name, count) in enumerate(counts.items()):
        for number in range(count):
            draw(folder / name / f"{number}.png", (40 * shade, number, len(folder.name)))
    return folder


def of_folder(folder: Path, tmp_path: Path, **settings) -> PicturesDataModule:
    data = PicturesDataModule(str(folder), data_dir=str(tmp_path / "made"), **{"image_size": 16} | settings)
    data.setup("fit")
    return data


def test_a_folder_with_splits(tmp_path, caplog):
    data = of_folder(PHOTOS, tmp_path, image_size=48)
    assert list(data.class_names) == CLASSES
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (40, 16, 16)
    assert data.train_set.labels.bincount().tolist() == [10] * 4
    assert data.input_shape == (3, 48, 48)
    assert "no test pictures" in caplog.text
    pixels = data.preprocess(data.train_set.images)
    assert pixels.mean().abs() < 1e-4
    assert abs(pixels.std() - 1) < 1e-3
    with Image.open(sorted((PHOTOS / "train" / "dress").iterdir())[0]) as file:
        expected = np.asarray(ImageOps.fit(file.convert("RGB"), (48, 48), Image.Resampling.BICUBIC), int)
    assert np.abs(data.train_set.images[0].permute(1, 2, 0).numpy() - expected).mean() < 3


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_folder_with_a_test_part_alone_is_tested_whole(tmp_path, name):
    put_classes(tmp_path / "own" / name, cat=10, dog=20)
    known: dict[str, Any] = {"image_size": 16, "val_size": 5000, "class_names": ["cat", "dog"]}  # of a checkpoint
    data = PicturesDataModule(str(tmp_path / "own"), data_dir=str(tmp_path / "made"), **known)
    for stage in ("validate", "test", "predict"):
        data.setup(stage)
    assert data.test_set.labels.bincount().tolist() == data.val_set.labels.bincount().tolist() == [10, 20]
    assert data.test_names[0] == f"{name}/cat/0.png"
    with pytest.raises(DatasetError, match=r"own holds one part alone, .*; add a train folder"):
        data.setup("fit")


def test_a_test_folder_may_lack_classes_of_the_network(tmp_path):
    put_classes(tmp_path / "own" / "test", dog=6)
    known: dict[str, Any] = {"image_size": 16, "class_names": ["cat", "dog", "emu"]}  # of a checkpoint
    data = PicturesDataModule(str(tmp_path / "own"), data_dir=str(tmp_path / "made"), **known)
    data.setup("test")
    assert data.class_names == ("cat", "dog", "emu") and data.test_set.labels.tolist() == [1] * 6
    put_classes(tmp_path / "own" / "test", dog=6, yak=6)
    with pytest.raises(DatasetError, match="yak is a class that the training pictures don't have"):
        PicturesDataModule(str(tmp_path / "own"), data_dir=str(tmp_path / "made"), **known).setup("test")


def test_parts_of_unusual_names_are_not_taken_for_classes_without_a_word(tmp_path, caplog):
    for part in ("seg_train", "seg_test"):
        put_classes(tmp_path / "own" / part, cat=6, dog=6)
    list_folder(tmp_path / "own", None, None, 0)
    assert "seg_test, seg_train all hold cat, dog, but are taken for classes" in caplog.text


def test_a_folder_without_splits_is_split_by_class_and_seed(tmp_path):
    folder = put_classes(tmp_path / "own", cat=40, dog=20, emu=3)
    data = of_folder(folder, tmp_path)
    counts = [part.labels.bincount(minlength=3).tolist() for part in (data.train_set, data.val_set, data.test_set)]
    assert counts == [[32, 16, 1], [4, 2, 1], [4, 2, 1]]
    again, other = of_folder(folder, tmp_path), of_folder(folder, tmp_path, split_seed=1)
    assert torch.equal(again.val_set.images, data.val_set.images)
    assert not torch.equal(other.val_set.images, data.val_set.images)
    everything = torch.cat([part.images for part in (data.train_set, data.val_set, data.test_set)]).flatten(1)
    assert len(everything.unique(dim=0)) == 63
    assert len(of_folder(folder, tmp_path, val_size=0, test_size=0).train_set) == 63
    assert len(of_folder(folder, tmp_path, test_size=0, val_size=21).val_set) == 21


def test_pictures_outside_the_classes_are_said_to_be_left_out(tmp_path, caplog):
    folder = put_classes(tmp_path / "own", cat=12, dog=12)
    list_folder(folder, None, None, 0)
    assert not caplog.records
    draw(folder / "b.png", (1, 2, 3))
    draw(folder / "a.png", (1, 2, 3))
    assert sum(map(len, list_folder(folder, None, None, 0).parts.values())) == 24
    assert caplog.messages == [f"{folder}: 2 pictures outside the classes' folders left out: a.png, ..."]


def test_a_picture_stays_in_its_part_when_others_come_and_go(tmp_path):
    folder = put_classes(tmp_path / "own", cat=100, dog=100)
    before = list_folder(folder, None, None, 0).parts
    for name in ("cat/0.png", "dog/7.png"):
        (folder / name).unlink()
    draw(folder / "cat" / "new.png", (1, 2, 3))
    after = list_folder(folder, None, None, 0).parts
    assert [len(part) for part in after.values()] == [len(before["train"]) - 1, len(before["val"]), len(before["test"])]
    moved = {
        file.path
        for part in before
        for file in set(before[part]) ^ set(after[part])
        if file.path not in ("cat/0.png", "dog/7.png", "cat/new.png")
    }
    assert len(moved) <= 6, "those at the edges between the parts alone"


def test_order_and_names_are_the_same_on_all_systems(tmp_path, monkeypatch):
    folder = put_classes(tmp_path / "own", b=10, C=10, a=10)
    draw(folder / "a" / "More" / "1.png", (1, 1, 1))
    draw(folder / "a" / "more.png", (1, 1, 2))
    linux = list_folder(folder, None, None, 0)
    assert linux.classes == ("C", "a", "b")
    monkeypatch.setattr(PurePath, "__lt__", lambda one, other: str(one).lower() < str(other).lower())  # as on Windows
    assert list_folder(folder, None, None, 0) == linux


def test_an_accent_is_the_same_in_either_spelling(tmp_path):
    both = []
    for form in ("NFC", "NFD"):
        names = {unicodedata.normalize(form, name): count for name, count in {"Éclair": 20, "Zebra": 20}.items()}
        found = list_folder(put_classes(tmp_path / form, **names), None, None, 0)
        parts = {
            part: [unicodedata.normalize("NFC", file.path) for file in files] for part, files in found.parts.items()
        }
        both.append((found.classes, parts))
    assert both[0] == both[1]


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(DATA, home / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    folder = put_classes(tmp_path / "own", cat=10, dog=10)
    PicturesDataModule(str(folder), data_dir="~/made", image_size=16).setup("fit")
    assert any((home / "made" / "cache").iterdir())
    assert FashionMNISTDataModule("~/data").data_dir == home / "data"
    with pytest.raises(UserError, match=r"^~no such user/data: nobody here has that home folder"):
        FashionMNISTDataModule("~no such user/data")
    rules = Trusted("a.ckpt", False, "", {}, fashion_mnist_files.whole_below)
    assert rules.data({"data_dir": "~/data"}) == {"data_dir": str(home / "data")}
    assert rules.data({"data_dir": "~no such user/data"}) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "own"]


def test_folders_of_systems_are_no_classes(tmp_path):
    folder = put_classes(tmp_path / "own", cat=10, dog=10)
    put_classes(folder, **{"@eaDir": 3, "__MACOSX": 3, ".trash": 3})
    draw(folder / "cat" / "._0.png")
    data = of_folder(folder, tmp_path)
    assert list(data.class_names) == ["cat", "dog"]
    assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == 20


def test_what_runs_leave_among_the_pictures_is_no_class(tmp_path):
    folder = put_classes(tmp_path / "own", cat=20, dog=20)
    flags = ["--model=lenet", "--data=.", "--max_epochs=1", "--batch_size=8", "--accelerator=cpu"]
    run = Path("logs", "lenet", "version_0")
    for number in range(2):
        answer = run_forked(*flags, folder=folder)
        assert answer.code == 0, answer.err
        assert ("logs holds runs, and is left out" in answer.err) == bool(number)
        names = yaml.safe_load((folder / run.with_name(f"version_{number}") / "config.yaml").read_text())["data"]
        assert names["class_names"] == ["cat", "dog"]
        if not number:
            checkpoint = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
            picture = f"--images={Path('cat', '0.png')}"
            for more in (["--data=."], [picture]):  # which write a table, and a contact sheet
                assert run_forked("predict", checkpoint, *more, "--accelerator=cpu", folder=folder).code == 0
            draw(folder / run / "lr_finder.png")  # of --lr auto
            inside = f"--ckpt_path={folder / run / 'checkpoints' / 'last.ckpt'}", "--images=.", "--accelerator=cpu"
            assert run_forked("predict", *inside, folder=folder / "dog").code == 0
            assert len(find_pictures([folder / "dog"])) == 20
    assert {path.name for path in folder.iterdir()} == {"cat", "dog", "data", "logs", "outputs"}


@pytest.mark.parametrize(
    ("left", "drawn"),
    [
        ("logs/.compare.lock", ()),  # before the first run of compare.py has its folder
        ("logs/sweeps/lenet-1a2b3c4d/.lock", ()),  # as above, of sweep.py
        ("logs/sweeps/lenet-1a2b3c4d/study.db", ("trials.png",)),
        ("outputs/comparison/report.md", ("curves.png",)),
        ("outputs/comparison/data_1/report.md", ("curves.png",)),
    ],
)
def test_what_comparisons_and_sweeps_leave_among_the_pictures_is_no_class(left, drawn, tmp_path):
    folder = put_classes(tmp_path, cat=6, dog=6)
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).touch()
    for name in drawn:
        draw((tmp_path / left).with_name(name))
    assert list_folder(folder, None, None, 0).classes == ("cat", "dog")
    assert len(find_pictures([folder])) == 12


def test_what_runs_leave_in_parts_and_classes_is_no_picture_of_theirs(tmp_path):
    for part in ("train", "val"):
        put_classes(tmp_path / part, cat=6, dog=6)
    listed, found = list_folder(tmp_path, None, None, 0), find_pictures([tmp_path])
    assert len(found) == 24
    for folder in (tmp_path / "train", tmp_path / "val", tmp_path / "train" / "cat", tmp_path / "val" / "dog" / "more"):
        for name in ("pictures.png", "mistakes.png", "gradcam/1-a.png"):
            draw(folder / "outputs" / f"predict_{Path(name).name}" / name)
        draw(folder / "logs" / "lenet" / "version_0" / "lr_finder.png")
        (folder / "logs" / "lenet" / "version_0" / "config.yaml").touch()
    assert list_folder(tmp_path, None, None, 0) == listed
    assert find_pictures([tmp_path]) == found
    sheet = tmp_path / "val" / "outputs" / "predict_pictures.png"
    assert find_pictures([sheet]) == [sheet / "pictures.png"]  # whoever asks for it gets it


def test_a_cache_beside_classes_or_parts_is_no_class(tmp_path):
    for folder in (put_classes(tmp_path / "own", cat=6, dog=6), tmp_path / "split"):
        put_classes(tmp_path / "split" / "train", cat=6, dog=6)
        for _ in range(2):
            data = PicturesDataModule(str(folder), data_dir=str(folder), image_size=16)
            data.setup("fit")
            assert data.class_names == ("cat", "dog")
        assert (folder / "cache").is_dir()


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("TRAIN", "eval"), ("Train_Set", "dev")])
def test_splits_by_other_names(tmp_path, names):
    for name in names:
        put_classes(tmp_path / "own" / name, cat=10, dog=10)
    assert list(of_folder(tmp_path / "own", tmp_path).class_names) == ["cat", "dog"]


@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_thousand_pictures_are_read_once_and_a_bar_shows_it(tmp_path):
    for label in range(50):
        (tmp_path / "own" / f"class {label}").mkdir(parents=True)
    for number in range(100_000):
        picture = b"P6 2 2 255\n" + struct.pack("<I", number) * 3
        (tmp_path / "own" / f"class {number % 50}" / f"{number}.ppm").write_bytes(picture)
    code = """
from datamodules import PicturesDataModule
data = PicturesDataModule("own", image_size=2)
data.setup("fit")
print(len(data.class_names), len(data.train_set), len(data.val_set), len(data.test_set))
"""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPO)}
    for bar in (True, False):
        ours, theirs = terminal()
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 10_000):
                shown += piece
        os.close(ours)
        assert process.communicate()[0].split() == [b"50", b"81000", b"9000", b"10000"]
        assert (b"Reading pictures" in shown, b"99%" in shown) == (bar, bar)
        assert not bar or 20 < shown.count(b"\r") < 2000, "it moves, and does not flood the terminal"


def test_classes_may_bear_the_names_of_splits(tmp_path):
    data = of_folder(put_classes(tmp_path / "own", train=10, ship=10), tmp_path)
    assert list(data.class_names) == ["ship", "train"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder.mkdir(), "has no sub-folders; one for each class"),
        (lambda folder: draw(folder / "a.png"), r"has no sub-folders \(pictures lie in it directly\)"),
        (lambda folder: put_classes(folder, cat=5), "has one class only, cat; a network needs"),
        (
            lambda folder: put_classes(folder / "inner", cat=5, dog=5),
            r"has one class only, inner; did you mean .*inner\?",
        ),
        (lambda folder: put_classes(folder, train=5, test=5), "train has no sub-folders; one for each class"),
        (lambda folder: (put_classes(folder, cat=5) / "dog").mkdir(), "dog holds no picture; remove it"),
        (
            lambda folder: (put_classes(folder / "train", a=5, b=5), put_classes(folder / "test", c=5)),
            "test/c is a class that the training pictures don't have",
        ),
        (
            lambda folder: (put_classes(folder / "train", a=5, b=5), put_classes(folder, test=5)),
            r"test holds no pictures in sub-folders named like the classes; sort them so, or move it out of .*own$",
        ),
        (
            lambda folder: (put_classes(folder / "train", a=5, b=5), put_classes(folder, test1=5)),
            r"train looks like a part, not like a class; move test1 out of .*own; or rename it",
        ),
        (
            lambda folder: (put_classes(folder / "train", a=5, b=5), put_classes(folder, more=5, unlabeled=5)),
            r"train looks like a part, not like a class; move more, unlabeled out of .*own; or rename it",
        ),
        (
            lambda folder: (put_classes(folder / "train", train=5), put_classes(folder / "test1", test1=5)),
            r"train looks like a part, not like a class; move test1 out of .*own; or rename it",
        ),
        (lambda folder: put_classes(folder, train=5, test1=5), "train has no sub-folders; one for each class"),
        (
            lambda folder: (put_classes(folder, a=5, b=5), put_classes(folder / "Test", a=5, b=5)),
            r"Test looks like a part, not like a class; add a train folder beside it, or move it out of .*own; or",
        ),
        (lambda folder: None, "can't be read: No such file or directory"),
        (
            lambda folder: (put_classes(folder, cat=9), (folder / "x").mkdir(), (folder / "x" / "0.png").touch()),
            "no picture of x is left to train on",
        ),
    ],
)
def test_bad_folders_are_one_line(tmp_path, make, expected):
    make(tmp_path / "own")
    with pytest.raises(DatasetError, match=expected) as error:
        of_folder(tmp_path / "own", tmp_path)
    assert "\n" not in str(error.value)


def test_bad_files_are_named_and_left_out_or_refused(tmp_path, caplog):
    folder = put_classes(tmp_path / "own", cat=20, dog=20)
    (folder / "cat" / "broken.jpg").write_bytes(b"no picture")
    cut = draw(folder / "dog" / "cut.png", size=(300, 300))
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "dog" / "notes.txt").touch()
    data = of_folder(folder, tmp_path)
    assert "2 pictures can't be read; left out: " in caplog.text
    assert "cat/broken.jpg is not a picture" in caplog.text
    assert "dog/cut.png" in caplog.text
    assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == 40
    with pytest.raises(DatasetError, match=r"2 pictures .* can't be read: .*--data.bad_files skip"):
        of_folder(folder, tmp_path, bad_files="refuse")


@pytest.mark.parametrize("suffix", [".jxl", ".jp2", ".avif", ".webp"])
def test_pictures_of_a_kind_that_can_not_be_read_are_named(suffix, tmp_path, caplog, monkeypatch):
    Image.init()
    for name in ("AVIF", "WEBP"):  # a Pillow that was built without them
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    monkeypatch.setattr(Image, "EXTENSION", {end: name for end, name in Image.EXTENSION.items() if end != suffix})
    monkeypatch.setattr(picture_files, "_suffixes", picture_files._suffixes.__wrapped__)
    folder = put_classes(tmp_path / "own", cat=20, dog=20)
    (folder / "cat" / f"new{suffix}").write_bytes(b"RIFF")
    of_folder(folder, tmp_path)
    assert f"1 picture can't be read; left out: cat/new{suffix} is not a picture that can be read (PNG, " in caplog.text


def test_a_picture_that_can_be_read_again_is_taken_in(tmp_path, monkeypatch):
    """Its file has not changed: permissions, a network drive or Pillow have."""
    from datamodules.files import decoding

    folder = put_classes(tmp_path / "own", cat=6, dog=6)

    def refuse(path: Path, edge: int) -> Image.Image:
        if path.name == "3.png":
            raise PictureError("can't be read: Permission denied")
        return read_picture(path, edge)

    for reader, number in ((refuse, 10), (refuse, 10), (read_picture, 12), (refuse, 12)):
        monkeypatch.setattr(decoding, "read_picture", reader)
        assert len(of_folder(folder, tmp_path, val_size=0, test_size=0).train_set) == number


def test_pictures_both_trained_on_and_tested_on_are_named(tmp_path, caplog):
    folder = tmp_path / "own"
    put_classes(folder / "train", cat=6, dog=6)
    put_classes(folder / "test", cat=6, dog=6)
    of_folder(folder, tmp_path, val_size=0)
    assert "both trained on" not in caplog.text
    shutil.copy(folder / "train" / "cat" / "3.png", folder / "test" / "cat" / "copy.png")
    of_folder(folder / "." / ".." / "own", tmp_path, val_size=0)
    assert "1 picture in both training and evaluation" in caplog.text
    assert "train/cat/3.png and test/cat/copy.png" in caplog.text


def test_links_are_followed_but_not_round_and_round(tmp_path):
    folder = put_classes(tmp_path / "own", cat=10, dog=10)
    put_classes(tmp_path / "elsewhere", more=7)
    (folder / "dog" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (folder / "cat" / "loop").symlink_to(folder / "cat")
    (folder / "cat" / "up").symlink_to(folder)  # where the dogs are
    data = of_folder(folder, tmp_path, val_size=0, test_size=0)
    assert data.train_set.labels.bincount().tolist() == [10, 17]


def test_names_in_any_script_are_text(tmp_path):
    data = of_folder(put_classes(tmp_path / "own", **{"кот": 6, "狗\x1b[31m": 6}), tmp_path)
    assert list(data.class_names) == ["кот", "狗?[31m"]


def test_pictures_are_turned_upright_and_transparency_is_white(tmp_path):
    folder = put_classes(tmp_path / "own", dog=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))
    (folder / "cat").mkdir()
    picture.save(folder / "cat" / "0.png", exif=exif)
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(folder / "cat" / "1.png")
    images = of_folder(folder, tmp_path, val_size=0, test_size=0).train_set.images
    assert images[0, 0, :6].min() > 240  # white was left, and is now above
    assert images[0, 0, 10:].max() < 15
    assert images[1].min() == 255


def test_grey_pictures_have_one_channel(tmp_path):
    for name, shade in (("dark", 20), ("light", 200)):
        for number in range(6):
            draw(tmp_path / "own" / name / f"{number}.png", (shade + number,) * 3)
    grey = of_folder(tmp_path / "own", tmp_path)
    assert grey.train_set.images.shape[1:] == (1, 16, 16)
    assert grey.input_shape == (1, 16, 16)
    assert of_folder(tmp_path / "own", tmp_path, channels=3).preprocess(grey.train_set.images).shape[1] == 3


def test_pictures_are_decoded_once_and_anew_when_they_change(tmp_path, monkeypatch):
    from datamodules.files import decoding as folders

    folder = put_classes(tmp_path / "own", cat=6, dog=6)
    before = of_folder(folder, tmp_path).train_set.images
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    decoded = []

    def count(path: Path, edge: int) -> Image.Image:
        decoded.append(path)
        return read_picture(path, edge)

    monkeypatch.setattr(folders, "read_picture", count)
    assert torch.equal(of_folder(folder, tmp_path).train_set.images, before)
    assert not decoded
    draw(files[0], (1, 2, 3))
    os.utime(files[0], ns=(1, 1))
    assert not torch.equal(of_folder(folder, tmp_path).train_set.images, before)
    assert len(decoded) == 12
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == files
    for ending, length in (("npy", None), ("npy", 500), ("npy", 0), ("json", None), ("json", 50), ("json", 0)):
        for stored in (tmp_path / "made" / "cache").glob(f"*.{ending}"):
            stored.unlink() if length is None else os.truncate(stored, length)
        assert len(of_folder(folder, tmp_path).train_set) == len(before)
    monkeypatch.undo()
    read_only = tmp_path / "file"
    read_only.touch()
    with pytest.raises(DatasetError, match=r"can't be kept in .*; set --data_dir"):
        PicturesDataModule(str(folder), data_dir=str(read_only), image_size=16).setup("fit")


def test_each_data_module_looks_at_its_folder_anew(tmp_path, monkeypatch):
    for place, dogs in (("here", 6), ("there", 7), ("there", 9)):
        put_classes(tmp_path / place / "own", cat=6, dog=dogs)
        monkeypatch.chdir(tmp_path / place)
        assert len(of_folder(Path("own"), tmp_path, val_size=0, test_size=0).train_set) == 6 + dogs


def test_files_of_the_same_names_sizes_and_times_are_told_apart(tmp_path):
    """As where all times are set alike: those of two folders, and one that was written over."""
    for name, blue in (("own", 10), ("other", 200)):
        for number, colour in enumerate([(0, 0, blue), (9, 9, blue)]):
            draw(tmp_path / name / f"class {number}" / "0.bmp", colour)
    files = sorted(tmp_path.rglob("*.bmp"))
    for blues in (10, 200), (70, 200):
        for file in files:
            os.utime(file, ns=(1, 1))
        of_both = [of_folder(tmp_path / name, tmp_path, val_size=0, test_size=0) for name in ("own", "other")]
        assert tuple(data.train_set.images[0, 2, 0, 0].item() for data in of_both) == blues
        draw(tmp_path / "own" / "class 0" / "0.bmp", (0, 0, 70))


def test_what_somebody_else_has_decoded_is_used(open_tmp_path):
    folder = put_classes(open_tmp_path / "own", cat=6, dog=6)
    count = len(of_folder(folder, open_tmp_path).train_set)
    made = open_tmp_path / "made"
    for path in [*made.rglob("*"), made]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = """
del sys.modules["datamodules"]
from datamodules import PicturesDataModule
if os.geteuid() == 0:  # no mode keeps root from writing
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
data = PicturesDataModule(sys.argv[1], data_dir=sys.argv[2], image_size=16)
data.setup("fit")
print(len(data.train_set))
"""
    done = python(code, folder, made)
    assert done.stdout == f"{count}\n", done.stderr
    for path in [made, *made.rglob("*")]:
        path.chmod(0o777)  # so that it can be removed


def test_a_set_in_a_folder_that_can_not_be_written_is_decoded_here(open_tmp_path):
    shared, here = open_tmp_path / "shared", open_tmp_path / "here"
    put_sample(shared / "MNIST" / "raw", raw=NAMES)
    here.mkdir()
    here.chmod(0o777)
    for path in [*shared.rglob("*"), shared]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = """
del sys.modules["datamodules"]
from datamodules import PicturesDataModule
import torchvision
torchvision.datasets.MNIST(sys.argv[1])  # imports what it needs, from where others may not read
if os.geteuid() == 0:  # no mode keeps root from writing
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
os.chdir(sys.argv[2])
data = PicturesDataModule(dataset="mnist", data_dir=sys.argv[1], image_size=28)
data.setup("fit")
print(len(data.train_set))
"""
    done = python(code, shared, here)
    assert done.stdout == "1350\n", done.stderr
    assert {path.suffix for path in (here / "data" / "cache").iterdir()} - {".lock"} == {".npy", ".json"}
    for path in [shared, *shared.rglob("*")]:
        path.chmod(0o777)  # so that it can be removed


def test_the_loaders_work_without_a_trainer():
    data = FashionMNISTDataModule(str(DATA), batch_size=100, val_size=250)
    data.setup("fit")
    data.setup("test")
    loader = data.train_dataloader()
    passes = [[labels for _, labels in loader] for _ in range(2)]
    assert [len(labels) for labels in passes[0]] == [100] * 12 + [50]
    assert not torch.equal(*map(torch.cat, passes))  # each in an order of its own
    assert [len(labels) for _, labels in data.val_dataloader()] == [100, 100, 50]
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 500


@pytest.mark.parametrize("end", [{"max_steps": 3}, {"max_epochs": 1}])  # within an epoch, and with it
def test_the_loaders_work_as_well_after_a_fit(end, tmp_path):
    data = data_module()
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    limits: Any = {"limit_val_batches": 0, "enable_model_summary": False} | end
    trainer = pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **limits)
    trainer.fit(LitClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))), data)
    loader = data.train_dataloader()
    passes = [torch.cat([images for images, _ in loader]) for _ in range(2)]
    assert not torch.equal(*passes)  # each in an order of its own
    assert all(sorted(rows(images)) == sorted(rows(data.train_set.images)) for images in passes)


@pytest.mark.parametrize("indices", [None, range(100), torch.arange(100), np.arange(100)])
def test_a_loader_of_ones_own_takes_the_training_images(indices):
    whole = data_module().train_set
    part: Any = whole if indices is None else Subset(whole, indices)
    batches = list(DataLoader(part, batch_size=32, shuffle=True))
    assert all(images.dtype == torch.uint8 and images.shape[1:] == (1, 28, 28) for images, _ in batches)
    images, labels = map(torch.cat, zip(*batches, strict=True))
    expected = whole[torch.arange(len(part))]
    pairs = [sorted(zip(rows(one), other.tolist(), strict=True)) for one, other in ((images, labels), expected)]
    assert pairs[0] == pairs[1]
    assert not torch.equal(labels, expected[1])


def test_a_decoding_that_was_killed_leaves_nothing_once_it_is_repeated(tmp_path):
    folder = put_classes(tmp_path / "own", cat=6, dog=6)
    killed = f"""
import os
from datamodules import PicturesDataModule
from datamodules.files import decoding
decoding.read_picture = lambda path, edge: os.kill(os.getpid(), 9)
PicturesDataModule({str(folder)!r}, data_dir={str(tmp_path / "made")!r}, image_size=16).setup("fit")
"""
    done = subprocess.run([sys.executable, "-c", killed], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    left = [path for path in (tmp_path / "made" / "cache").iterdir() if path.suffix != ".lock"]
    assert len(left) == 1
    of_folder(folder, tmp_path)
    assert {path.suffix for path in left[0].parent.iterdir()} - {".lock"} == {".npy", ".json"}
    assert not left[0].exists()


def test_processes_that_no_lock_keeps_apart_decode_one_folder_at_once(tmp_path, monkeypatch):
    """The second begins and ends while the first one reads."""
    folder, turn, others = put_classes(tmp_path / "own", cat=6, dog=6), threading.Lock(), []
    second = f"""
import errno, fcntl
def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
from datamodules import PicturesDataModule
data = PicturesDataModule({str(folder)!r}, data_dir={str(tmp_path / "made")!r}, image_size=16)
data.setup("fit")
print(len(data.train_set))
"""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def read(path: Path, edge: int) -> Image.Image:
        if turn.acquire(blocking=False):
            others.append(subprocess.run([sys.executable, "-c", second], cwd=REPO, capture_output=True, text=True))
        return read_picture(path, edge)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        patched.setattr("datamodules.files.decoding.read_picture", read)
        images = of_folder(folder, tmp_path).train_set.images
    assert others[0].stdout == "8\n", others[0].stderr
    assert torch.equal(images, of_folder(folder, tmp_path / "again").train_set.images)
    assert not [path for path in (tmp_path / "made" / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc, to see which files are open")
def test_no_open_file_is_renamed(like_windows, tmp_path, monkeypatch):
    folder = put_classes(tmp_path / "own", cat=6, dog=6)
    for bad in (False, True):
        if bad:
            (folder / "cat" / "broken.jpg").write_bytes(b"no picture")
        assert len(of_folder(folder, tmp_path, val_size=0, test_size=0).train_set) == 12
    assert {path.suffix for path in (tmp_path / "made" / "cache").iterdir()} == {".npy", ".json", ".lock"}

    def stop(*_: Any) -> None:
        raise Stopped("Stopped by Ctrl-C.", 130)

    monkeypatch.setattr("datamodules.files.decoding.read_picture", stop)
    with pytest.raises(Stopped):
        of_folder(folder, tmp_path, image_size=20)
    assert not [path for path in (tmp_path / "made" / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs Linux's user namespaces, to mount a small disk",
)
def test_disk_too_small_for_the_pictures(tmp_path):
    folder, disk = put_classes(tmp_path / "own", cat=30, dog=30), tmp_path / "disk"
    disk.mkdir()
    train = f"{sys.executable} {REPO / 'train.py'} --model photos/10min --data {folder} --data_dir {disk}"
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk} && {train}; code=$?; find {disk} -name '*.npy'; exit $code"
    done = subprocess.run(["unshare", "-rm", "bash", "-c", mount], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith("No space left on device; set --data_dir")
    assert ".npy" not in done.stdout


def test_pictures_that_no_one_may_read(open_tmp_path):
    folder = put_classes(open_tmp_path / "own", cat=12, dog=12)
    (folder / "cat" / "more").mkdir()
    shut, user = folder / "cat" / "more", os.geteuid()
    draw(shut / "1.png", (1, 2, 3))
    shut.chmod(0)
    if user == 0:
        os.seteuid(65534)  # root may read anything
    try:
        with pytest.raises(PermissionError, match=str(shut)):
            list_folder(folder, None, None, 0)
        with pytest.raises(PictureError, match="can't be read: Permission denied"):
            read_picture(shut / "1.png")
    finally:
        os.seteuid(user)
        shut.chmod(0o755)


def test_a_folder_beside_the_parts_need_not_be_readable(open_tmp_path):
    folder, user = open_tmp_path / "own", os.geteuid()
    for part in ("train", "val"):
        put_classes(folder / part, cat=12, dog=12)
    shut = folder / "lost+found"
    shut.mkdir(mode=0)
    if user == 0:
        os.seteuid(65534)
    try:
        assert list_folder(folder, None, None, 0).classes == ("cat", "dog")
    finally:
        os.seteuid(user)
        shut.chmod(0o755)


def test_a_class_stays_one(tmp_path):
    """In which a run was started, or that the network knows by the name of a part."""
    own = put_classes(tmp_path / "own", dog=6)
    put_classes(own / "cat", black=6, white=6)
    run = own / "cat" / "logs" / "lenet" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert list_folder(own, None, None, 0).classes == ("cat", "dog")
    transport = put_classes(tmp_path / "transport", bus=6)
    put_classes(transport / "train", steam=6, electric=6)
    with pytest.raises(DatasetError, match="looks like a part, not like a class"):
        list_folder(transport, None, None, 0)
    assert list_folder(transport, None, None, 0, ("bus", "train")).classes == ("bus", "train")


def test_a_signal_is_no_fault_of_a_picture(tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise Stopped("Stopped by Ctrl-C.", 130)

    path = draw(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", stop)
    with pytest.raises(Stopped):
        read_picture(path)


def test_another_folder_than_the_network_was_trained_on(tmp_path):
    with pytest.raises(DatasetError, match="has the classes cat, dog; the network knows dress, hat, pants, shoes"):
        of_folder(put_classes(tmp_path / "own", cat=5, dog=5), tmp_path, class_names=CLASSES)
    with pytest.raises(DatasetError, match="say which: --data"):
        PicturesDataModule(class_names=CLASSES).setup("fit")


def test_a_checkpoint_says_neither_where_pictures_lie_nor_where_their_cache_goes(tmp_path):
    settings = {"folder": str(PHOTOS), "data_dir": str(tmp_path), "class_names": CLASSES, "stored_size": 4096}
    rules = Trusted("a.ckpt", False, "", {}, lambda folder: folder)
    expected = {"folder": "", "dataset": "", "class_names": CLASSES, "stored_size": 4096}
    assert rules.data(settings) == expected
    for dataset, used in (("cifar10", "cifar10"), ("torchvision.datasets.CIFAR10", ""), ("os.system", ""), (["a"], "")):
        assert rules.data(settings | {"dataset": dataset}) == expected | {"dataset": used}
    with pytest.raises(UserError, match="no machine can hold"):
        rules.data(settings | {"stored_size": 8192})
    moved = {"image_size": 96, "stored_size": 96, "crop_padding": 40}  # as augmentation
    assert rules.data(settings | moved) == expected | moved
    for names in ([], [1], "dress", None, [["dress"]]):
        with pytest.raises(UserError, match="does not name the classes"):
            rules.data(settings | {"class_names": names})
    assert rules.data({"data_dir": str(tmp_path)}) == {"data_dir": str(tmp_path)}


def test_a_plain_trainers_checkpoint_on_a_path_of_ones_own_can_be_read(tmp_path):
    numbers: Any = {"mean": np.float32(0.25), "std": torch.tensor(0.5), "saturation": np.float64(0.5)}
    folder: Any = put_classes(tmp_path / "own", cat=20, dog=20)
    data = PicturesDataModule(folder, data_dir=tmp_path / "made", image_size=16, **numbers)
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, default_root_dir=tmp_path, **quiet)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))
    trainer.fit(LitClassifier(net, num_classes=2), data)
    assert trainer.test(datamodule=data, ckpt_path="best", verbose=False)
    loaded = PicturesDataModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore
    assert [loaded.hparams[name] for name in ("mean", "std", "saturation")] == [0.25, 0.5, 0.5]
    assert loaded.class_names == ("cat", "dog")


def test_a_fashion_mnist_checkpoint_is_not_tested_on_a_folder(tmp_path):
    released = REPO / "weights" / "lenet.ckpt"
    for recipe in ([], ["--model=lenet"]):
        answer = run_forked("test", *recipe, f"--ckpt_path={released}", f"--data={PHOTOS}", folder=tmp_path)
        assert answer.code == 2
        assert "lenet.ckpt was trained on Fashion-MNIST; leave --data out" in answer.err


@pytest.mark.parametrize(("memory", "kept"), [(16_000_000_000, True), (80_000, False)])
def test_pictures_stay_off_a_gpu_whose_memory_they_would_fill(tmp_path, monkeypatch, memory, kept):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, 80_000_000_000))
    folder = put_classes(tmp_path / "own", cat=20, dog=20)  # 40 of 16 x 16 x 3 bytes
    data = PicturesDataModule(str(folder), data_dir=str(tmp_path), image_size=16)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    data.trainer = trainer
    data.setup("fit")
    assert data.hparams["dataset_on_device"] is kept
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80_000, 80_000_000_000))  # taken by the run
    data.setup("test")
    assert data.hparams["dataset_on_device"] is kept


def test_balanced_batches_draw_each_class_alike():
    labels = torch.tensor([0] * 900 + [1] * 100)

    def drawn_by(batch_size: int, rank: int = 0, processes: int = 1) -> torch.Tensor:
        batches = TrainBatches(1000, batch_size, rank, processes)
        batches.weights = 1 / labels.bincount()[labels].double()
        return torch.cat(list(batches))

    drawn = labels[drawn_by(64)]
    assert len(drawn) == 1000
    assert 400 < drawn.sum() < 600
    halves = torch.cat([drawn_by(32, rank, 2) for rank in range(2)])
    assert sorted(halves.tolist()) == sorted(drawn_by(64).tolist())


def test_warp_turns_scales_and_moves():
    torch.manual_seed(0)
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 12:20, 12:20] = 255
    assert torch.equal(warp(images, 0, 0, 0), images)
    moved = warp(images, 0.0, 0.0, 0.25).float()
    assert moved[:, 0].sum(dim=(1, 2)).sub(64 * 255).abs().max() < 200  # nothing is lost
    centres = (moved[:, 0].sum(dim=1) * torch.arange(32)).sum(dim=1) / moved[:, 0].sum(dim=(1, 2)) - 15.5
    assert 7 < centres.abs().max() <= 8.1
    areas = warp(images, 0.0, 0.5, 0.0).float()[:, 0].sum(dim=(1, 2)) / (64 * 255)
    assert 0.24 < areas.min() < 0.35
    assert 1.8 < areas.max() < 2.3
    turned = warp(images, 180.0, 0.0, 0.0).float()[:, 0]
    assert (turned.sum(dim=(1, 2)) / (64 * 255) - 1).abs().max() < 0.1
    assert turned[:, 11, 15].max() > 100  # a corner of the square now lies above its edge


def test_warp_goes_on_at_the_edges_as_the_outermost_pixels():
    plain = torch.full((50, 3, 20, 30), 200, dtype=torch.uint8)
    assert torch.equal(warp(plain, 40.0, 0.5, 0.4), plain)
    halves = plain.clone()
    halves[..., 15:] = 100
    moved = warp(halves, 0.0, 0.0, 0.25)  # by up to a quarter of the size
    assert set(moved[..., 0].unique().tolist()) == {200} and set(moved[..., -1].unique().tolist()) == {100}


def bars(count: int) -> torch.Tensor:
    """Images (N, 1, 28, 28) of a bar twenty pixels long and four high, in tones that rise from left to right."""
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 12:16, 4:24] = torch.linspace(60, 250, 20).byte()
    return images


def test_photographed_changes_a_share_and_repeats_itself():
    images, labels = sample(101)
    assert photographed(images, labels, 0.0) is images
    torch.manual_seed(3)
    changed = photographed(images, labels, 0.4)
    differs = (changed != images).flatten(1).any(dim=1)
    assert changed.dtype == torch.uint8
    assert differs[:40].all() and not differs[40:].any()
    torch.manual_seed(3)
    assert torch.equal(photographed(images, labels, 0.4), changed)
    assert not torch.equal(photographed(images, labels, 0.4), changed)


def test_photographed_garments_lie_on_grounds_and_keep_their_pattern(monkeypatch):
    monkeypatch.setattr("datamodules.files.grounds._laid", lambda layers, labels: layers)
    torch.manual_seed(0)
    images, labels = bars(400), torch.zeros(400, dtype=torch.long)
    outside = torch.ones(28, 28, dtype=torch.bool)
    outside[9:19, 1:27] = False

    monkeypatch.setattr("datamodules.files.grounds.WHOLE", 1.0)
    whole = photographed(images, labels, 1.0).float()[:, 0]
    grounds = whole[:, outside]
    assert grounds.mean(dim=1).std() > 40, "dark and light ones"
    assert (grounds.std(dim=1) > 2).float().mean() > 0.9, "none is plain"
    tones = torch.corrcoef(torch.cat([images[:1, 0, 13:15, 5:23].flatten(1), whole[:, 13:15, 5:23].flatten(1)]))[0, 1:]
    assert (tones.abs() > 0.8).float().mean() > 0.7
    assert 0.25 < (tones < 0).float().mean() < 0.55, "some are inverted"

    monkeypatch.setattr("datamodules.files.grounds.WHOLE", 0.0)
    cut = photographed(images, labels, 1.0).float()[:, 0]
    assert cut[:, outside].mean() < 5 < 60 < cut[:, 13:15, 6:22].mean()


def test_photographed_shoes_point_anywhere_and_come_in_pairs():
    torch.manual_seed(0)
    images = bars(400).float() / 255
    layers = torch.cat([images, (images > 0).float()], dim=1)

    def laid(label: int) -> tuple[float, float]:
        """How many bars stand upright, and how many leave the middle of the frame to what lies between two."""
        opaque = _laid(layers, torch.full((400,), label))[:, 1] > 0.5
        height, width = opaque.any(dim=2).sum(dim=1), opaque.any(dim=1).sum(dim=1)
        assert torch.maximum(height, width).float().mean() > 22, "they fill the frame"
        return float((height > width + 4).float().mean()), float(
            (~opaque[:, 13:15, 13:15].any(2).any(1)).float().mean()
        )

    for label in range(10):
        upright, apart = laid(label)
        if label in (5, 7, 9):  # Sandal, Sneaker, Ankle boot
            assert 0.1 < upright < 0.5 and 0.5 < apart < 0.85
        else:
            assert upright == apart == 0


def test_saturation_keeps_greys():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    changed = saturate(images, 0.5)
    assert changed.dtype == torch.uint8
    assert (changed.float() - images.float()).abs().max() > 20
    grey = images[:, :1].expand_as(images)
    assert torch.equal(saturate(grey, 0.5), grey)
    assert torch.equal(saturate(images, 0.0), images)
    assert torch.equal(saturate(images[:, :1], 0.5), images[:, :1])


def test_a_folder_is_trained_on_tested_and_looked_at(tmp_path):
    """The whole way of one's own pictures, through the command line."""
    folder = str(PHOTOS)
    common = ["--accelerator=cpu", f"--data_dir={tmp_path}", "--data.eval_batch_size=5"]
    flags = [f"--data={folder}", "--image_size=32", "--batch_size=8", f"--log_dir={tmp_path / 'logs'}"]
    augmented = ["--data.rotation=20", "--data.zoom=0.2", "--data.shift=0.1", "--data.saturation=0.3"]
    balanced = ["--class_weights", "--data.balanced=true", "--data.random_erasing=0.2", "--max_epochs=2"]
    answer = run_forked("--model=fast/1min", "--precision=32", *flags, *common, *augmented, *balanced, folder=tmp_path)
    assert answer.code == 0, answer.err
    run = tmp_path / "logs" / "fast" / "1min" / "version_0"
    best = "logs/fast/1min/version_0/checkpoints/best.ckpt"
    assert f"  python train.py predict --ckpt_path {best} --data {folder} --data_dir .\n" in answer.out
    record = json.loads((run / "record.json").read_text())
    assert (record["train_images"], record["val_images"], record["test"]["images"]) == (40, 16, 16)
    assert list(record["test"]["class_accuracy"]) == CLASSES
    assert record["config"]["class_weights"]
    assert "\nBy class: " in answer.out
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["data"]["class_names"] == CLASSES
    assert settings["model"]["num_classes"] == settings["model"]["net"]["init_args"]["num_classes"] == 4
    assert settings["data"]["mean"] != 0.286  # of the pictures, not of the recipe
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    tested = run_forked("test", checkpoint, f"--data={folder}", *common, folder=tmp_path)
    picture = sorted((PHOTOS / "validation" / "hat").iterdir())[0]
    output = f"--output={tmp_path / 'own.json'}"
    looked_at = run_forked("predict", checkpoint, "--accelerator=cpu", f"--images={picture}", output, folder=tmp_path)
    assert looked_at.code == 0, looked_at.err
    at_home = run_forked("test", "--model=fast/1min", checkpoint, *common, folder=tmp_path)
    assert (at_home.code, "say which: --data" in at_home.err) == (2, True)
    assert "test on 16 images: accuracy" in tested.out
    assert all(f"{name} {share:.3f}" in tested.out for name, share in record["test"]["class_accuracy"].items())
    (row,) = json.loads((tmp_path / "own.json").read_text())["pictures"]
    assert list(row["probabilities"]) == CLASSES
    data = PicturesDataModule.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert list(data.class_names) == CLASSES
    images = torch.from_numpy(data.fit_picture(read_picture(picture, data.stored_size))).permute(2, 0, 1)[None]
    model = LitClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    expected = dict(zip(CLASSES, model.probabilities(data.preprocess(images))[0].tolist(), strict=True))
    assert row["probabilities"] == pytest.approx(expected, abs=1e-4)
    written = export(run / "checkpoints" / "best.ckpt", "torch_export", tmp_path / "own.pt2", None, trust=False)
    assert "Checked on 60 images of noise: same class on all" in written


def test_a_run_knows_the_pictures_it_was_trained_on(tmp_path):
    folder = put_classes(tmp_path / "mine", bag=20, coat=20)
    common = ["--accelerator=cpu", f"--data={folder}", f"--data_dir={tmp_path}", f"--log_dir={tmp_path / 'logs'}"]
    recipe = ["--model=lenet", "--max_epochs=2", "--batch_size=8"]
    trained = run_forked(*recipe, *common, folder=tmp_path)
    assert trained.out.rstrip().endswith("version_0/checkpoints/best.ckpt --data mine --data_dir .")
    checkpoint = f"--ckpt_path={tmp_path / 'logs' / 'lenet' / 'version_0' / 'checkpoints' / 'last.ckpt'}"
    assert run_forked("fit", *recipe, *common, checkpoint, folder=tmp_path).code == 0
    assert run_forked("predict", *common, checkpoint, folder=tmp_path).code == 0
    rows = list(csv.DictReader((tmp_path / "outputs" / "predict_0" / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert all((folder / row["picture"]).is_file() and row["picture"].startswith(row["label"]) for row in rows)
    tested = run_forked("test", checkpoint, *common, folder=tmp_path)
    before, known = tested.out, "may have been trained on some of these"
    assert known not in tested.err
    seen = {row["picture"] for row in rows}
    for file in folder.rglob("*.png"):
        if str(file.relative_to(folder)) not in seen:
            draw(file, (255, 255, int(file.stem)))
    tested = run_forked("test", checkpoint, *common, folder=tmp_path)
    assert tested.out == before and known in tested.err
    assert run_forked("test", "--model=lenet", checkpoint, *common, folder=tmp_path).out == before  # the old mean
    answer = run_forked(*recipe, *common, "--model.net.num_classes=5", folder=tmp_path)
    assert (answer.code, "num_classes=5 does not fit the pictures, which need 2" in answer.err) == (2, True)
    answer = run_forked("test", *common, checkpoint, "--data=fashion_mnist", folder=tmp_path)
    assert (answer.code, "leave --data fashion_mnist out" in answer.err) == (2, True)
    for own in (recipe, []):
        answer = run_forked("fit", *own, *common, checkpoint, folder=tmp_path)
        assert answer.code == 2
        message = "the training pictures are not those that the checkpoint was trained on"
        assert message in answer.err.splitlines()[-1]
    content, spoilt = torch.load(checkpoint.partition("=")[2], weights_only=True), tmp_path / "spoilt.ckpt"
    config = yaml.safe_load(content["config"])
    torch.save(content | {"config": yaml.safe_dump(config | {"data": config["data"] | {"mean": "abc"}})}, spoilt)
    answer = run_forked("fit", *recipe, *common, "--ckpt_path=spoilt.ckpt", folder=tmp_path)
    expected = "train.py: error: spoilt.ckpt says of its images what can't be: must be real number, not str\n"
    assert (answer.code, answer.err) == (2, expected)


def test_a_folder_named_like_a_set_is_named_so_that_it_is_meant(tmp_path):
    put_classes(tmp_path / "cifar10", cat=20, dog=20)
    flags = ["--model=lenet", "--data=./cifar10", "--max_epochs=1", "--batch_size=8", "--accelerator=cpu"]
    answer = run_forked(*flags, folder=tmp_path)
    command = answer.out.rstrip().rpartition("python train.py ")[2]
    assert command.endswith(" --data ./cifar10"), answer
    done = run_forked(*shlex.split(command), "--accelerator=cpu", folder=tmp_path)
    assert (done.code, "class probabilities of 4 images" in done.out) == (0, True), done


def test_classes_may_be_called_like_numbers(tmp_path):
    names = ("12e3", "1_000", "1e5", "null")
    put_classes(tmp_path / "own", **dict.fromkeys(names, 10))
    common = ["--data=own", "--accelerator=cpu", "--batch_size=8"]
    assert run_forked("--model=lenet", "--max_epochs=1", *common, folder=tmp_path).code == 0
    checkpoint = "--ckpt_path=logs/lenet/version_0/checkpoints/last.ckpt"
    shown = ["--images=own/1e5/0.png", "--output=own.json", "--accelerator=cpu"]
    for command in (["test", *common], ["fit", "--model=lenet", "--max_epochs=1", *common], ["predict", *shown]):
        answer = run_forked(*command, checkpoint, folder=tmp_path)
        assert answer.code == 0, answer.err
    (row,) = json.loads((tmp_path / "own.json").read_text())["pictures"]
    assert tuple(row["probabilities"]) == names


def test_what_is_drawn_from_the_training_pictures_is_known(tmp_path):
    for number in range(24):  # each picture has a folder of its own
        draw(tmp_path / "own" / ("cat", "dog")[number % 2] / str(number) / "a.png", (number, 0, 0))
    drawn, apart = of_folder(tmp_path / "own", tmp_path), of_folder(PHOTOS, tmp_path)
    assert drawn.held_out("val") and drawn.held_out("test")
    assert not apart.held_out("val") and not apart.held_out("test")


def test_a_limit_that_leaves_out_classes_is_named(tmp_path, caplog):
    data = of_folder(put_classes(tmp_path / "own", cat=40, dog=40), tmp_path, eval_batch_size=4)
    silent: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    silent |= {"enable_checkpointing": False, "enable_model_summary": False, "use_distributed_sampler": False}
    lit = LitClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2)), num_classes=2)
    for limits in ({"limit_val_batches": 2, "limit_test_batches": 1.0}, {"fast_dev_run": 1}):
        trainer = pl.Trainer(**silent, **limits)
        trainer.validate(lit, data, verbose=False)
        trainer.test(lit, data, verbose=False)
        assert "leaves out" not in caplog.text
    pl.Trainer(**silent, limit_test_batches=0.5).test(lit, data, verbose=False)
    assert "trainer.limit_test_batches=0.5 leaves out the last classes of" in caplog.text
    pl.Trainer(**silent, limit_val_batches=1).validate(lit, data, verbose=False)
    assert "trainer.limit_val_batches=1 leaves out the last classes of" in caplog.text


def test_a_photograph_is_seen_as_it_was_trained_on(tmp_path):
    """Large JPEGs are decoded at a fraction of their size, which depends on the edge that is asked for."""
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(3):
            noise = np.random.default_rng(number).integers(0, 256, (75, 100, 3), np.uint8)
            large = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
            large.save(tmp_path / "own" / name / f"{number}.jpg")
    data = of_folder(tmp_path / "own", tmp_path, image_size=64)
    looked_at = read_pictures([tmp_path / "own" / name for name in data.test_names], "auto", data)
    stored = data.test_set.images.permute(0, 2, 3, 1)
    assert torch.equal(torch.from_numpy(np.stack(looked_at.images)), stored)


@pytest.mark.parametrize(("fit", "edges"), [("crop", (200, 200)), ("pad", (0, 200)), ("stretch", (90, 200))])
def test_pictures_become_squares(fit, edges):
    """A wide picture, red in the middle, dark at both ends."""
    wide = Image.new("RGB", (80, 40), (90, 0, 0))
    wide.paste((200, 0, 0), (20, 0, 60, 40))
    data = PicturesDataModule(image_size=20, channels=3, mean=0.5, fit=fit)
    seen = data.fit_picture(wide)
    assert seen.shape == (20, 20, 3)
    top_left, centre = int(seen[0, 0, 0]), int(seen[10, 10, 0])
    assert (top_left, centre) == pytest.approx(edges, abs=3)
    line = data.fit_picture(Image.new("RGB", (1, 200_000), (200, 0, 0)))
    assert line.shape == (20, 20, 3)
    assert line[10, 10, 0] > 150 or fit == "pad"
    tall = data.fit_picture(wide.rotate(90, expand=True))
    assert np.abs(tall.astype(int) - np.rot90(seen)).max() <= 1


# ---- Other data sets: torchvision's by name, read from files in their formats, and classes like them.


def as_mnist(monkeypatch, *mirrors: str) -> None:
    """Let torchvision take the sample of Fashion-MNIST, whose files are in MNIST's format, for MNIST."""
    sums = [(name, hashlib.md5((SAMPLE / name).read_bytes()).hexdigest()) for name in GZ_NAMES]
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", list(mirrors))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)


def of_set(tmp_path: Path, name: str, **settings) -> PicturesDataModule:
    torchvision_sets._opened.cache_clear()
    data = PicturesDataModule(dataset=name, data_dir=str(tmp_path), **{"image_size": 28} | settings)
    data.setup("fit")
    return data


def test_the_command_line_and_the_reader_know_the_same_sets():
    assert set(DATA_SETS) == {"fashion_mnist", *torchvision_sets.NAMED}
    for name in torchvision_sets.NAMED:
        assert issubclass(
            getattr(torchvision.datasets, torchvision_sets.NAMED[name][0]), torchvision.datasets.VisionDataset
        )


def test_archives_are_extracted_whole_or_not_at_all(tmp_path):
    """torchvision takes a folder for the whole set as soon as it is there."""
    from torchvision.datasets import utils

    for number in range(2):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as archive:
            archive.writestr(f"set/{number}/a.txt", "first")
            archive.writestr(f"set/{number}/b.txt", "second")
    broken = (tmp_path / "0.zip").read_bytes().replace(b"second", b"sEcond")
    (tmp_path / "broken.zip").write_bytes(broken)
    with torchvision_sets._quiet_and_limited():
        with pytest.raises(zipfile.BadZipFile):
            utils.extract_archive(str(tmp_path / "broken.zip"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.zip", "1.zip", "broken.zip"]
        (tmp_path / "there" / ".extracting-0.zip-killed").mkdir(parents=True)
        for number in range(2):
            found = utils.extract_archive(str(tmp_path / f"{number}.zip"), str(tmp_path / "there"))
            assert found == str(tmp_path / "there")
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["set"]
        packed = gzip.compress(b"pixels" * 1000)
        for content in (packed[:-9], packed):
            (tmp_path / "images.h5.gz").write_bytes(content)
            with contextlib.suppress(EOFError):
                torchvision.datasets.pcam._decompress(str(tmp_path / "images.h5.gz"))
            assert (tmp_path / "images.h5").exists() == (content == packed)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "there").rglob("*.txt"))
    assert found == [f"there/set/{number}/{name}.txt" for number in range(2) for name in "ab"]


def test_a_set_is_fetched_from_a_mirror_once(tmp_path, server, monkeypatch, capfd):
    as_mnist(monkeypatch, "http://127.0.0.1:9/", server.mirror("healthy"))
    data = of_set(tmp_path, "mnist", image_size=32)
    assert data.class_names[:2] == ("0 - zero", "1 - one")
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (1350, 150, 500)
    assert data.val_set.labels.bincount().tolist() == [15] * 10
    assert data.input_shape == (1, 32, 32)
    assert torch.equal(data.test_set.images[:, 0], load(DATA, "test")[0])  # in their own size
    pixels = data.preprocess(data.train_set.images)
    assert abs(pixels.mean()) < 0.01
    assert capfd.readouterr().out == ""
    fetched = server.requests.copy()
    assert torch.equal(of_set(tmp_path, "mnist", image_size=28).val_set.images, data.val_set.images)
    assert server.requests == fetched


def test_letters_that_lie_on_their_sides_are_put_upright(tmp_path, monkeypatch):
    taken, locked = [], torchvision_sets.locked

    def noted(path):
        taken.append(path.name)
        return locked(path)

    monkeypatch.setattr(torchvision_sets, "locked", noted)
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:  # the sample of Fashion-MNIST, whose files are in the same format
        as_digits = name.replace("train-", "emnist-digits-train-").replace("t10k-", "emnist-digits-test-")
        (raw / as_digits).write_bytes(gzip.decompress((SAMPLE / f"{name}.gz").read_bytes()))
    data = of_set(tmp_path, "emnist_digits")
    assert torch.equal(data.test_set.images[:, 0], load(DATA, "test")[0].mT)
    assert taken == [".emnist.lock"]  # the four sets have one archive


@pytest.mark.parametrize(("manner", "problem"), [("truncated", "corrupted"), ("web_page", "corrup")])
def test_a_set_that_can_not_be_fetched_is_one_line(tmp_path, server, monkeypatch, manner, problem):
    as_mnist(monkeypatch, server.mirror(manner))
    with pytest.raises(DatasetError, match=f"^mnist can't be read from .*{problem}.*; get online, or put") as error:
        of_set(tmp_path, "mnist")
    assert "\n" not in str(error.value)


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    """Colour pictures in pickled batches, whose checksums torchvision compares."""
    folder, cifar = tmp_path / "cifar-10-batches-py", torchvision.datasets.CIFAR10
    folder.mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (30, 3072), np.uint8)
    for name, keys in (
        *((name, {"data": colours, "labels": [*range(10)] * 3}) for name in ("data_batch_1", "test_batch")),
        ("batches.meta", {"label_names": [f"class {number}" for number in range(10)]}),
    ):
        (folder / name).write_bytes(pickle.dumps(keys))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setattr(cifar, "url", "http://127.0.0.1:9/none")
    data = of_set(tmp_path, "cifar10", image_size=64)
    assert (data.stored_size, data.input_shape, data.class_names[9]) == (32, (3, 64, 64), "class 9")
    assert np.array_equal(data.test_set.images.numpy(), colours.reshape(30, 3, 32, 32))
    assert data.hparams["mean"] == pytest.approx(data.train_set.images.float().mean().item() / 255, abs=1e-3)
    (folder / "test_batch").write_bytes(b"something else")
    with pytest.raises(DatasetError, match="cifar10 can't be read from"):
        of_set(tmp_path, "cifar10")


OWN_SET = """
import io
import numpy as np
from PIL import Image

class Mine:
    classes = ["ant", "bee", "cat"]
    def __init__(self, root, split="train"):
        if split not in ("train", "valid"):
            raise ValueError(f"Unknown value {split!r}")
        self.count = {"train": 60, "valid": 12}[split]
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return Image.new("RGB", (40, 30), (index, 0, self.count)), 1 + index % 2

class Arrays(Mine):
    def __getitem__(self, index):
        return np.full((16, 16), index, np.uint8), index % 3

class Spoilt(Mine):
    def __init__(self, root, split="train"):
        if split == "val":
            raise ValueError("an invalid header")  # the part is known
        super().__init__(root, split)

class Texts(Mine):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], "ant"

class Named(Arrays):
    classes = [("ant", "Formicidae"), ("crane", "Gruidae"), ("crane",)]

class Lazy(Mine):
    @property
    def labels(self):
        return ["bee", "cat"] * (self.count // 2)
    def __getitem__(self, index):
        picture, label = super().__getitem__(index)
        picture.save(file := io.BytesIO(), "BMP")
        return Image.open(io.BytesIO(file.getvalue()[: 900 if index == 0 else None])), label

class Eager(Lazy):
    @property
    def targets(self):
        return [1, 2] * (self.count // 2)
    def __getitem__(self, index):
        picture, label = super().__getitem__(index if index < self.count - 1 else 0)
        return picture.convert("RGB"), label

class Missing(Lazy):
    def __getitem__(self, index):
        return Image.open(f"no such folder/{index}.png"), 1

class Fractions(Mine):
    def __getitem__(self, index):
        return np.zeros((8, 8)), 0

class Same(Mine):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], 0

number = 1
"""


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_sets.py").write_text(OWN_SET)
    monkeypatch.syspath_prepend(tmp_path)
    data = of_set(tmp_path, "own_sets.Mine", image_size=20)
    assert data.class_names == ("bee", "cat")  # no picture is an ant
    assert (len(data.train_set), len(data.val_set), data.stored_size) == (60, 12, 20)
    assert torch.equal(data.test_set.images, data.val_set.images)
    small = of_set(tmp_path, "own_sets.Arrays", image_size=20)
    assert (small.stored_size, small.input_shape, len(small.class_names)) == (16, (1, 20, 20), 3)
    assert of_set(tmp_path, "own_sets.Named").class_names == ("ant", "crane 1", "crane 2")
    lazy = of_set(tmp_path, "own_sets.Lazy")
    assert (lazy.class_names, len(lazy.train_set), len(lazy.val_set)) == (("bee", "cat"), 59, 11)
    eager = of_set(tmp_path, "own_sets.Eager")  # the first file is broken, and the last
    assert (eager.class_names, len(eager.train_set), len(eager.val_set)) == (("bee", "cat"), 58, 10)
    for name, problem in (
        ("own_sets.Texts", "whole numbers|invalid literal"),
        ("own_sets.Fractions", "ndarray of float64 where a picture was expected"),
        ("own_sets.Same", "has the classes ant; two or more"),
        ("own_sets.Spoilt", "can't be read from .*: an invalid header; get online"),
        ("own_sets.Missing", "Missing can't be used: .*No such file or directory: 'no such folder/0.png'"),
        ("own_sets.number", "is no class"),
        ("own_sets.Absent", "can't be imported"),
        ("cifar1", "there is no data set cifar1; give .* cifar10"),
    ):
        with pytest.raises(DatasetError, match=problem) as error:
            of_set(tmp_path, name)
        assert "\n" not in str(error.value)


def test_labels_in_a_file_are_read_at_once(tmp_path, monkeypatch):
    """PCAM would open two files for each; NumPy's files stand in for those of h5py."""
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=np.load))
    shades = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    (tmp_path / "pcam").mkdir()
    for files in torchvision.datasets.PCAM._FILES.values():
        for part, key, values in (("images", "x", shades), ("targets", "y", shades[:, :1, :1, :1] % 2)):
            with (tmp_path / "pcam" / files[part][0]).open("wb") as file:
                np.savez(file, allow_pickle=False, **{key: values})
    read, opened = [], torchvision.datasets.PCAM.__getitem__

    def watched(one: Any, index: int) -> Any:
        read.append(index)
        return opened(one, index)

    monkeypatch.setattr(torchvision.datasets.PCAM, "__getitem__", watched)
    torchvision_sets._opened.cache_clear()
    labels = torchvision_sets._opened("pcam", tmp_path)[1]
    assert labels["val"] == (shades[:, 0, 0, 0] % 2).tolist()
    assert len(read) == 3 * torchvision_sets.PROBES


def test_pictures_of_digits_are_turned_light_on_dark():
    page = Image.new("RGB", (60, 60), "white")
    page.paste("black", (20, 20, 40, 40))
    digits = PicturesDataModule(dataset="mnist", image_size=28, channels=1, mean=0.13)
    grey = PicturesDataModule(image_size=28, channels=1, mean=0.5)
    repeated = PicturesDataModule(dataset="mnist", image_size=28, channels=3, mean=0.13)
    assert repeated.fit_picture(page)[0, 0].tolist() == [0] * 3
    page.putpixel((30, 30), (255, 0, 0))
    assert repeated.fit_picture(page)[0, 0].tolist() == [255] * 3  # one in colour stays as it is
    assert (digits.fit_picture(page)[0, 0], digits.fit_picture(page, "never")[0, 0]) == (0, 255)
    assert (grey.fit_picture(page)[0, 0], grey.fit_picture(page, "always")[0, 0]) == (255, 0)


@pytest.mark.parametrize("invert", ["auto", "always"])
def test_bars_are_black_around_a_picture_that_is_negated_too(invert):
    page = Image.new("RGB", (60, 20), "white")
    page.paste("black", (20, 5, 40, 15))
    for channels in (1, 3):
        data = PicturesDataModule(dataset="mnist", image_size=30, channels=channels, mean=0.13, fit="pad")
        seen = data.fit_picture(page, invert).reshape(30, 30, -1)
        assert (seen[0].max(), seen[29].max()) == (0, 0)
        assert (seen[15, 1].max(), seen[15, 15].min()) == (0, 255)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_a_negated_picture_is_the_negative(fit):
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    data = PicturesDataModule(image_size=16, channels=3, mean=0.5, fit=fit)
    positive, negative = (data.fit_picture(Image.fromarray(noise), way) for way in ("never", "always"))
    assert np.array_equal(negative, 255 - positive)


def test_pictures_negated_unasked_are_counted(tmp_path, capsys):
    files = [draw(tmp_path / f"{name}.png", colour) for name, colour in (("a", (250,) * 3), ("b", (250, 250, 0)))]
    files += [draw(tmp_path / "c.png", (9, 9, 9)), draw(tmp_path / "d.png", (255,) * 3)]
    data = PicturesDataModule(dataset="mnist", image_size=16, channels=3, mean=0.13)
    read_pictures(files, "never", data)
    read_pictures(files[1:3], "auto", data)
    assert capsys.readouterr().err == ""
    seen = read_pictures(files, "auto", data).images
    assert [image[8, 8].tolist() for image in seen] == [[5] * 3, [250, 250, 0], [9] * 3, [0] * 3]
    expected = "2 pictures negated, as those trained on are dark; --invert never leaves them\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_set_is_trained_on_and_its_checkpoint_stands_alone(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).write_bytes(gzip.decompress((SAMPLE / f"{name}.gz").read_bytes()))
    common = ["--accelerator=cpu", f"--data_dir={tmp_path}"]
    flags = ["--model=lenet", "--data=mnist", "--max_epochs=1", f"--log_dir={tmp_path / 'logs'}"]
    answer = run_forked(*flags, *common, folder=tmp_path)
    assert answer.code == 0, answer.err
    run = tmp_path / "logs" / "lenet" / "version_0"
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (data["dataset"], data["stored_size"], data["channels"]) == ("mnist", 28, 1)
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    tested = run_forked("test", checkpoint, *common, folder=tmp_path)
    assert "test on 500 images: accuracy" in tested.out, tested.err
    said = export(run / "checkpoints" / "last.ckpt", "torch_export", tmp_path / "a.pt2", None, False)
    assert "same class on all" in said
    # The user's own values win over the pictures', a recipe's of this project do not.
    (tmp_path / "own.yaml").write_text("data: {mean: 0.25, channels: 3}")
    own = ["--data=mnist", "--config=own.yaml", "--print_config"]
    printed = yaml.safe_load(run_forked("fit", "--model=lenet", *own, *common, folder=tmp_path).out)["data"]
    assert (printed["mean"], printed["channels"]) == (0.25, 3)
    assert data["mean"] != 0.286
