"""The data module: split, order, batches of several processes, and the pixels, held against torchvision's."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from commands import DATA
from PIL import Image
from torchvision.transforms import functional as TF

from datamodules import CLASS_NAMES, DatasetError, FashionMNISTDataModule
from datamodules.fashion_mnist import EvalBatches, ImageTensors, TrainBatches
from datamodules.files.finding import load


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
    assert all(0 < len(batch) <= batch_size for own in batches for batch in own)
    seen = [index for own in batches for batch in own for index in batch.tolist()]
    assert set(seen) == set(range(count))
    # Only where the last global batch has fewer images than processes does one stand in for the missing.
    last = count % (batch_size * world_size)
    stand_ins = world_size - last if 0 < last < world_size else 0
    assert len(seen) == count + stand_ins


def test_processes_share_the_global_batches_of_one():
    one = list(TrainBatches(100, 12))
    for world_size in (2, 3, 4):
        parts = [list(TrainBatches(100, 12 // world_size, rank, world_size)) for rank in range(world_size)]
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
