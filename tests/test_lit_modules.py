"""The classifier, alone and under a Trainer; the fast path against the plain one."""

import copy
import pickle
import statistics
from functools import partial
from itertools import product
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from commands import DATA
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.memory import LiveBytes
from callbacks.progress import EpochProgress
from callbacks.speed import Speed
from datamodules import FashionMNISTDataModule
from datamodules.batches import ImageTensors, TrainBatches
from errors import UserError
from launch.checks import check_accumulation
from lit_modules import LitClassifier
from lit_modules.execution.activation_checkpointing import apply_activation_checkpointing
from lit_modules.initialization import he_initialization
from lit_modules.metrics import MeanLoss, StageMetrics
from lit_modules.schedules import WarmupDecay
from models import VGG, AlexNet, GoogLeNet, LeNet, NiN

# ---- LitClassifier in real Trainer runs on the sample: losses, metrics, optimisers, schedules, checkpoints.


class Watch(Callback):
    """Notes learning rate and momentum of every step, the logged values of every epoch."""

    def __init__(self):
        self.rates, self.metrics = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


class Plateau(lr_scheduler.ReduceLROnPlateau):
    """Notes what it is given."""

    seen: ClassVar[list[float]] = []

    def step(self, metrics, epoch=None):  # type: ignore[override]  # as torch's own class does
        self.seen.append(float(metrics))
        super().step(metrics, epoch)


def data_module(**settings):
    return FashionMNISTDataModule(str(DATA), **{"val_size": 200, "batch_size": 100, **settings})


def trainer(folder, *callbacks, **settings):
    defaults: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 1, "logger": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults |= {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **(defaults | settings))


def linear(inputs=784):
    """The smallest network that learns: logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))


def rates(folder, scheduler, interval, **settings):
    watch = Watch()
    lit = LitClassifier(linear(), partial(torch.optim.SGD, lr=0.1), scheduler, interval)
    trainer(folder, watch, **settings).fit(lit, data_module())
    return watch.rates


# --- optimisers and schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        partial(torch.optim.Adam, lr=1e-2, fused=True),
        partial(torch.optim.AdamW, lr=1e-2),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(torch.optim.RMSprop, lr=1e-3),
        partial(torch.optim.Adagrad, lr=0.1),
    ],
)
def test_any_optimizer_learns(optimizer, tmp_path):
    torch.manual_seed(0)
    watch = Watch()
    trainer(tmp_path, watch, limit_train_batches=None, max_epochs=3).fit(
        LitClassifier(linear(), optimizer), data_module(mean=0.286, std=0.353)
    )
    assert watch.metrics[-1]["train/loss"] < watch.metrics[0]["train/loss"]
    assert watch.metrics[-1]["val/accuracy"] > 0.5


def test_without_a_schedule_the_rate_stays(tmp_path):
    assert rates(tmp_path, None, "epoch") == [0.1] * 10


def test_cosine_by_step_takes_the_length_of_the_run(tmp_path):
    found = rates(tmp_path, partial(lr_scheduler.CosineAnnealingLR, T_max=-1), "step")
    assert found == pytest.approx(
        [0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 10)).item()) for step in range(10)]
    )


def test_cosine_by_epoch_takes_the_number_of_epochs(tmp_path):
    found = rates(tmp_path, partial(lr_scheduler.CosineAnnealingLR, T_max=-1), "epoch", max_epochs=4)
    assert found[::5] == pytest.approx([0.1, 0.05 * (1 + 2**-0.5), 0.05, 0.05 * (1 - 2**-0.5)])
    assert found[::5] == found[4::5]
    for most in (8, -1):
        ends = {"max_epochs": most, "max_steps": 20}
        assert rates(tmp_path, partial(lr_scheduler.CosineAnnealingLR, T_max=-1), "epoch", **ends) == found


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_run_without_batches_is_no_endless_one(interval, tmp_path):
    assert rates(tmp_path, WarmupDecay, interval, limit_train_batches=0) == []


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("epochs", [None, -1])
@pytest.mark.parametrize(
    ("schedule", "argument"),
    [(WarmupDecay, "total_steps"), (partial(lr_scheduler.CosineAnnealingLR, T_max=-1), "T_max")],
)
def test_a_schedule_as_long_as_a_run_without_end_is_refused(schedule, argument, epochs, interval, tmp_path):
    with pytest.raises(ValueError, match=f"which has no end: give max_epochs, or {argument}$"):
        rates(tmp_path, schedule, interval, max_epochs=epochs, max_time={"seconds": 1})


def test_a_given_length_is_kept(tmp_path):
    found = rates(tmp_path, partial(lr_scheduler.CosineAnnealingLR, T_max=20), "step")
    assert found[-1] == pytest.approx(0.05 * (1 + torch.cos(torch.tensor(torch.pi * 9 / 20)).item()))


def test_one_cycle_takes_the_length_of_the_run(tmp_path):
    found = rates(tmp_path, partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=None, pct_start=0.4), "step")
    assert found[0] == pytest.approx(1 / 25)
    assert found[3] == max(found) == pytest.approx(1.0)
    assert found[-1] == pytest.approx(1 / 25 / 1e4)


def test_linear_by_step_takes_the_length_of_the_run(tmp_path):
    scheduler = partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.5, total_iters=-1)
    found = rates(tmp_path, scheduler, "step")
    assert found == pytest.approx([0.1 - 0.005 * step for step in range(10)])


def test_step_lr_needs_no_length(tmp_path):
    found = rates(tmp_path, partial(lr_scheduler.StepLR, step_size=1, gamma=0.1), "epoch")
    assert found == pytest.approx([0.1] * 5 + [0.01] * 5)


def test_reduce_on_plateau_watches_the_validation_loss(tmp_path):
    watch = Watch()
    lit = LitClassifier(linear(), partial(torch.optim.SGD, lr=0.1), Plateau)
    trainer(tmp_path, watch).fit(lit, data_module())
    assert Plateau.seen == pytest.approx([epoch["val/loss"] for epoch in watch.metrics])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warmup_decay_spans_the_optimizer_steps(accumulate, tmp_path):
    schedule = partial(WarmupDecay, warmup=0.4, shape="linear")
    schedule = schedule if accumulate == 1 else partial(schedule, total_steps=-1)
    found = rates(tmp_path, schedule, "step", limit_train_batches=10, max_epochs=1, accumulate_grad_batches=accumulate)
    steps = 10 // accumulate
    up = round(0.4 * steps)
    expected = [0.1 * (step + 1) / up for step in range(up)]
    expected += [0.1 * (1 - (step - up) / (steps - up)) for step in range(up, steps)]
    assert found == pytest.approx([rate for rate in expected for _ in range(accumulate)])


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_warmup_decay(shape, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupDecay(optimizer, 20, warmup, shape, final=0.1)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = round(20 * warmup)
    assert max(found) == pytest.approx(2.0)
    assert found[:peak] == pytest.approx([2.0 * (step + 1) / peak for step in range(peak)])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    if warmup < 1:
        half = (peak + 20) / 2  # half way down both shapes are half way between peak and end
        assert found[int(half)] == pytest.approx(2.0 * 0.55, abs=0.25)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert min(found) > 0


@pytest.mark.parametrize("settings", [{"warmup": 1.1}, {"warmup": -0.1}, {"final": 2.0}, {"warmup": float("nan")}])
def test_warmup_decay_refuses(settings):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        WarmupDecay(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 10, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"lr": float("nan")}, "nan"),
        ({"lr": float("inf")}, "inf"),
        ({"weight_decay": -0.1}, "weight_decay value: -0.1"),
        ({"weight_decay": float("nan")}, "nan"),
        ({"eps": float("inf")}, "inf"),
        ({"betas": (1.5, 0.9)}, "beta"),
        ({"betas": (float("nan"), 0.9)}, "nan"),
    ],
)
def test_settings_of_the_optimizer_are_checked_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        LitClassifier(linear(), partial(torch.optim.Adam, **settings))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        LitClassifier(linear(), label_smoothing=smoothing)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [-0.1, float("inf"), float("nan")])
def test_mixing_out_of_range(name, alpha):
    with pytest.raises(ValueError, match=f"{name}={alpha} must be a finite number"):
        LitClassifier(linear(), **{name: alpha})


# --- loss, metrics, initialisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_accuracy_are_those_of_all_images(smoothing, tmp_path):
    """With a rate of 0 the network stands still, so the epoch's training metrics are those of one pass over the set."""
    watch, data = Watch(), data_module(batch_size=64)  # 1,300 = 20 x 64 + 20, 200 = 3 x 64 + 8
    torch.manual_seed(0)
    net = linear()
    lit = LitClassifier(net, partial(torch.optim.SGD, lr=0.0), label_smoothing=smoothing)
    trainer(tmp_path, watch, max_epochs=1, limit_train_batches=None, limit_val_batches=None).fit(lit, data)
    for stage, images, share in (("train", data.train_set, smoothing), ("val", data.val_set, 0.0)):
        logits = net(images.images / 255).detach()
        loss = F.cross_entropy(logits, images.labels, label_smoothing=share)
        accuracy = (logits.argmax(dim=1) == images.labels).double().mean()
        assert watch.metrics[0][f"{stage}/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert watch.metrics[0][f"{stage}/accuracy"] == pytest.approx(accuracy.item(), rel=1e-6)


def test_losses_in_half_precision_are_summed_in_float64():
    metrics = StageMetrics("train", num_classes=10)
    metrics["loss"].set_dtype(torch.float64)
    logits, labels = torch.zeros(100, 10), torch.zeros(100, dtype=torch.long)
    metrics.add_trained([(torch.tensor(loss, dtype=torch.bfloat16), logits, labels) for loss in (1.0, 1.0078125)])
    assert metrics.compute()["train/loss"] == 1.00390625


def test_mixup_blends_pairs_of_images_and_labels():
    torch.manual_seed(0)
    mix = LitClassifier(linear(), mixup=0.4).mix
    assert mix is not None
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    mixed, targets = mix(images, labels)
    share = targets[0, 0]
    partner = (targets[0] == 1 - share).nonzero().item()
    torch.testing.assert_close(mixed[0], share * images[0] + (1 - share) * images[partner])
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(10))
    assert len({mix(images, labels)[1][0, 0].item() for _ in range(20)}) == 20


def test_cutmix_pastes_as_much_as_the_target_says():
    torch.manual_seed(0)
    mix = LitClassifier(linear(), cutmix=1.0).mix
    assert mix is not None
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    mixed, targets = mix(images, labels)
    kept = mixed == images
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(kept.float().mean(dim=(1, 2, 3)), targets.diagonal())
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(10))


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_training_on_mixed_images(mixing, tmp_path):
    """Loss against the mixed targets, accuracy against the larger share; all drawn from the step's own seed."""

    class Expect(Callback):
        hits, seen = 0, 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.random.fork_rng(), torch.no_grad():
                images, targets = pl_module.mix(*batch)
                logits = pl_module(images)
                self.loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
                self.hits += (logits.argmax(dim=1) == targets.argmax(dim=1)).sum().item()
                self.seen += len(images)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.testing.assert_close(outputs["loss"], self.loss)

    torch.manual_seed(0)
    expect, watch = Expect(), Watch()
    lit = LitClassifier(linear(), partial(torch.optim.SGD, lr=0.1), label_smoothing=0.1, **mixing)
    trainer(tmp_path, expect, watch, max_epochs=1).fit(lit, data_module())
    assert expect.seen == 500
    assert watch.metrics[0]["train/accuracy"] == pytest.approx(expect.hits / expect.seen)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_what_an_interrupted_run_has_counted_is_forgotten(stage, tmp_path):
    class Interrupt(Callback):
        def on_train_batch_end(self, *_):
            raise InterruptedError

        on_validation_batch_end = on_test_batch_end = on_train_batch_end

    def run(classifier, *callbacks):
        one = trainer(tmp_path, *callbacks, max_epochs=1, limit_val_batches=None)
        getattr(one, stage)(classifier, data)
        return {name: value.item() for name, value in one.callback_metrics.items()}

    data, net = data_module(), linear()
    lit, fresh = (LitClassifier(net, partial(torch.optim.SGD, lr=0.0)) for _ in range(2))
    with pytest.raises(InterruptedError):
        run(lit, Interrupt())
    assert run(lit) == run(fresh)


def test_images_that_were_not_scaled_are_refused(tmp_path):
    data = data_module()
    data.setup("test")
    with pytest.raises(ValueError, match=r"are torch\.uint8; give Trainer the data module, or use its preprocess"):
        trainer(tmp_path).test(LitClassifier(linear()), data.test_dataloader(), verbose=False)


def test_flip_averaged_testing_stands_beside_the_plain(tmp_path):
    torch.manual_seed(0)
    lit, data = LitClassifier(linear(), flip_test=True), data_module()
    nn.init.normal_(lit.net.get_parameter("1.weight"))  # so that a mirror image makes a difference
    (found,) = trainer(tmp_path).test(lit, data, verbose=False)
    images, labels = data.test_set.images / 255, data.test_set.labels
    plain, mirrored = lit(images).detach(), lit(images.flip(-1)).detach()
    for ending, logits in (("", plain), ("_flip", (plain + mirrored) / 2)):
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert found[f"test/accuracy{ending}"] == pytest.approx(accuracy)
        assert found[f"test/loss{ending}"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["test/loss"] != found["test/loss_flip"]
    (without,) = trainer(tmp_path).test(LitClassifier(lit.net), data, verbose=False)
    assert set(without) == {"test/accuracy", "test/loss"}


@pytest.mark.parametrize(("bar", "shown"), [(EpochProgress, False), (TQDMProgressBar, True)])
def test_only_lightnings_bars_get_the_loss_at_every_step(bar, shown, tmp_path):
    seen = []

    class Losses(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(
                [metrics.get("train/loss_step") for metrics in (trainer.progress_bar_metrics, trainer.callback_metrics)]
            )

    speed = Speed()
    callbacks = [Losses(), speed, bar(speed) if bar is EpochProgress else bar()]
    run = trainer(tmp_path, *callbacks, enable_progress_bar=True, log_every_n_steps=1)
    run.fit(LitClassifier(linear()), data_module())

    in_bar, for_callbacks = seen[-1]
    assert (in_bar is not None) == shown
    assert for_callbacks > 0


def test_the_loss_at_a_step_is_the_mean_since_the_one_before(tmp_path):
    """Within the epoch, at the steps that Lightning writes, which need not divide an epoch's."""
    losses, written = [], {}

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(outputs["loss"].item())

    class Written(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if "train/loss_step" in metrics:
                written[step] = metrics["train/loss_step"]

    run = trainer(tmp_path, Losses(), logger=Written(tmp_path), log_every_n_steps=3, max_epochs=3)
    run.fit(LitClassifier(linear()), data_module())
    since = {2: 0, 5: 5, 8: 6, 11: 10, 14: 12}  # each of the three epochs has five steps
    assert written == pytest.approx({step: sum(losses[i : step + 1]) / (step + 1 - i) for step, i in since.items()})


def test_mean_loss_weighs_by_images():
    metric = MeanLoss()
    metric.update(torch.tensor(6.0), torch.tensor(3))
    metric.update(torch.tensor([1.0, 1.0]), torch.tensor([1, 4]))
    assert metric.compute() == 1.0
    metric.reset()
    with pytest.warns(UserWarning, match="called before"):
        assert metric.compute().isnan()


def test_an_ignored_label_counts_nowhere():
    torch.manual_seed(0)
    lit = LitClassifier(linear())
    images, labels = torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 2, 3, -100, -100])
    lit.test_step((images, labels), 0)
    logits = lit.net(images[:4])
    assert lit.metrics["test"]["loss"].compute() == pytest.approx(F.cross_entropy(logits, labels[:4]).item())
    assert lit.metrics["test"]["accuracy"].compute() == (logits.argmax(dim=1) == labels[:4]).float().mean()


def test_he_initialization():
    torch.manual_seed(0)
    convolution, norm, linear_layer = nn.Conv2d(64, 128, 5), nn.BatchNorm2d(128), nn.Linear(2000, 500)
    before = norm.weight.clone()
    LitClassifier(nn.Sequential(convolution, norm, linear_layer, nn.Linear(9, 9, bias=False)), initialization="he")
    for layer, fan_in in ((convolution, 64 * 25), (linear_layer, 2000)):
        weight = layer.weight.detach().flatten()
        assert weight.mean().abs() < 4 * (2 / fan_in / len(weight)) ** 0.5
        assert weight.std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.01)
        assert (weight.abs() > 3 * weight.std()).float().mean() > 0.001  # normal, not uniform
        assert torch.equal(layer.get_parameter("bias"), torch.zeros(len(layer.weight)))
    assert torch.equal(norm.weight, before)


def test_default_initialization_is_pytorchs():
    torch.manual_seed(3)
    expected = LeNet().state_dict()
    torch.manual_seed(3)
    found = LitClassifier(LeNet(), output_bias=1.0).net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_output_bias_lets_every_class_of_nin_start_alive():
    images, logits = torch.rand(16, 1, 67, 67), {}
    for bias in (None, 1.0):
        torch.manual_seed(1)
        logits[bias] = LitClassifier(NiN(), initialization="he", output_bias=bias).net.eval()(images)
    assert not (logits[None] > 0).any(dim=0).all()  # a class is dead for all images
    assert torch.equal(logits[1.0], torch.ones(16, 10))
    logits[1.0].sum().backward()  # would raise if nothing had a gradient


def test_output_bias_that_batch_normalisation_would_undo_is_refused():
    with pytest.raises(ValueError, match=r"output_bias=1\.0: the batch normalisation after the last layer undoes it"):
        LitClassifier(NiN(batch_norm=True), initialization="he", output_bias=1.0)


def test_output_bias_must_be_finite():
    with pytest.raises(ValueError, match="output_bias=inf must be a finite number"):
        LitClassifier(linear(), output_bias=float("inf"))


@pytest.mark.parametrize("wanted", [True, False])
def test_channels_last(wanted):
    net = LeNet()
    LitClassifier(net, channels_last=wanted)
    weight = net.get_parameter("features.3.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == wanted


@pytest.mark.parametrize("labels", [[torch.zeros(5)], []])
def test_predictions_are_probabilities(labels, tmp_path):
    torch.manual_seed(0)
    lit = LitClassifier(linear())
    images = torch.rand(5, 1, 28, 28)
    batches = DataLoader(TensorDataset(images, *labels) if labels else images, batch_size=2)  # type: ignore[arg-type]
    probabilities: Any = trainer(tmp_path).predict(lit, batches)
    torch.testing.assert_close(torch.cat(probabilities), lit(images).softmax(dim=1).detach())


def test_a_step_draws_from_seed_epoch_batch_and_rank_alone(tmp_path):
    """Dropout of step n does not depend on what was drawn before it."""

    class Draws(Callback):
        def __init__(self, disturb):
            self.disturb, self.drawn = disturb, []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.drawn.append(torch.rand(1).item())
            if self.disturb:
                torch.rand(100)

    runs = []
    for disturb in (False, True):
        pl.seed_everything(1, verbose=False)
        draws = Draws(disturb)
        trainer(tmp_path, draws).fit(LitClassifier(linear()), data_module())
        runs.append(draws.drawn)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 10


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_alone_rebuilds_the_network(trained):
    content = torch.load(trained.best, weights_only=True)
    loaded = LitClassifier.load_from_checkpoint(trained.best, weights_only=True)
    assert isinstance(loaded.net, LeNet)
    assert loaded.hparams["scheduler_interval"] == "step"
    assert isinstance(loaded.optimizer([nn.Parameter(torch.zeros(1))]), torch.optim.AdamW)
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in loaded.state_dict().items())


def test_compiling_keeps_the_names_in_checkpoints(tmp_path):
    torch.manual_seed(0)
    plain = LeNet()
    lit = LitClassifier(LeNet(), partial(torch.optim.SGD, lr=0.1), compile=True)
    assert lit.net._compiled_call_impl is not None
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()  # PyTorch 2.8 would not compile a second time
    lit.net.compile(backend=backend)  # the default one needs a C++ compiler and a minute
    run = trainer(tmp_path, limit_train_batches=1, max_epochs=1)
    run.fit(lit, data_module())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert calls
    names = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"].keys()  # made just above
    assert set(names) == {f"net.{name}" for name in plain.state_dict()}


@pytest.mark.parametrize("compile", [False, True, "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_copies_of_a_classifier_compute_the_same(compile):
    torch.manual_seed(0)
    lit, images = LitClassifier(LeNet(), compile=compile), torch.rand(3, 1, 28, 28)
    assert (lit.net._compiled_call_impl is not None) == bool(compile)
    for one in (copy.deepcopy(lit), pickle.loads(pickle.dumps(lit)), AveragedModel(lit).module):  # as EMA's
        assert torch.equal(one(images), lit.net.forward(images))


# ---- The fast path computes what a plain loop computes: channels-last, fused, in-place, batched loading, the Trainer.

STEPS = 50
# (network without dropout, whose mask depends on the memory format; image size; batch size)
NETWORKS = [
    pytest.param(lambda: LeNet(), 28, 32, id="lenet"),
    pytest.param(lambda: AlexNet(image_size=67, dropout=0), 67, 8, id="alexnet"),
    pytest.param(lambda: VGG(width_divisor=8, image_size=32, dropout=0), 32, 16, id="vgg11_small"),
    pytest.param(lambda: NiN(dropout=0), 67, 8, id="nin"),
    pytest.param(lambda: GoogLeNet(), 32, 8, id="googlenet"),
]
# Training magnifies rounding errors until two curves part, whatever the loops: a maximum of two nearly equal numbers is
# enough. So the tutorials' learning rate is compared in float64, with an initialization that trains from the first step
# on, and float32 with a learning rate that leaves the errors small.
PRECISIONS = [
    pytest.param("64-true", torch.float64, 1e-3, he_initialization, id="float64"),
    pytest.param("32-true", torch.float32, 1e-5, lambda module: None, id="float32"),
]
SLOWEST = [*product(("float32", "float64"), ("alexnet", "nin")), ("float32", "googlenet")]


def _start_of(epoch: int) -> tuple[int, int]:
    return epoch, 0


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def tutorial_data(image_size: int, batch_size: int, **settings) -> FashionMNISTDataModule:
    return FashionMNISTDataModule(str(DATA), batch_size, image_size, val_size=100, **settings)


def trainer_losses(net, image_size, batch_size, lr, precision, **settings) -> list[float]:
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=STEPS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=losses,
    )
    model = LitClassifier(net, partial(torch.optim.Adam, lr=lr, fused=True))
    trainer.fit(model, tutorial_data(image_size, batch_size, **settings))
    return losses.values


def plain_losses(net, image_size, batch_size, lr, dtype) -> list[float]:
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    data = tutorial_data(image_size, batch_size)
    data.prepare_data()
    data.setup("fit")
    images, labels = data.train_set.images, data.train_set.labels
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, foreach=False, fused=False)
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS:
        for indices in TrainBatches(len(labels), batch_size, position=partial(_start_of, epoch)):
            inputs = torch.stack([images[index].float() / 255 for index in indices])
            if image_size != 28:
                inputs = F.interpolate(inputs, (image_size, image_size), mode="bilinear")
            loss = F.cross_entropy(net(inputs.to(dtype)), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == STEPS:
                break
        epoch += 1
    return losses


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You have overridden `on_before_batch")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated", "ignore:`isinstance.treespec")
@pytest.mark.parametrize(
    ("build", "image_size", "batch_size", "precision", "dtype", "lr", "initialize"),
    [
        pytest.param(
            *network.values,
            *precision.values,
            id=f"{precision.id}-{network.id}",
            marks=pytest.mark.long if (precision.id, network.id) in SLOWEST else (),
        )
        for precision in PRECISIONS
        for network in NETWORKS
    ],
)
def test_loss_curve_is_the_plain_loops(build, image_size, batch_size, precision, dtype, lr, initialize):
    pl.seed_everything(0, verbose=False)
    net, plain = build(), build()
    net.apply(initialize)
    plain.load_state_dict(net.state_dict())

    ours = trainer_losses(net, image_size, batch_size, lr, precision)
    theirs = plain_losses(plain.to(dtype), image_size, batch_size, lr, dtype)

    assert ours == pytest.approx(theirs, rel=1e-4)
    assert statistics.mean(theirs[-10:]) < statistics.mean(theirs[:10])  # it did train


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You have overridden `on_before_batch")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated", "ignore:`isinstance.treespec")
def test_data_set_on_the_device_changes_nothing():
    runs = []
    for on_device in (False, True):
        pl.seed_everything(0, verbose=False)
        augmented = {"crop_padding": 2, "horizontal_flip": True, "dataset_on_device": on_device}
        runs.append(trainer_losses(LeNet(), 28, 32, 1e-3, "32-true", **augmented))

    assert runs[0] == runs[1]


def test_data_set_moves_whole_to_another_device():
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    moved = ImageTensors(images, torch.arange(3)).to(torch.device("meta"))

    batch, labels = moved.__getitems__(torch.tensor([2, 0]))

    assert (batch.device.type, labels.device.type) == ("meta", "meta")
    assert batch.shape == (2, 1, 28, 28)
    assert labels.shape == (2,)


def test_workers_can_not_reach_a_data_set_on_the_device():
    with pytest.raises(ValueError, match=r"dataset_on_device needs data\.num_workers=0"):
        tutorial_data(28, 8, dataset_on_device=True, num_workers=1)


def test_one_compilation_serves_all_batch_sizes():
    model = LitClassifier(LeNet(), compile=True)
    model.net.compile(backend="eager")  # counts as any other, and needs no C++ compiler
    torch._dynamo.reset()
    counters.clear()

    for size in (8, 8, 5):
        model(torch.rand(size, 1, 28, 28)).sum().backward()
    trained = counters["stats"]["unique_graphs"]
    model.eval()
    with torch.no_grad():
        for size in (8, 3):
            model(torch.rand(size, 1, 28, 28))

    assert trained == 1
    assert counters["stats"]["unique_graphs"] == 2


def test_cuda_graphs_serve_full_batches_alone():
    torch.manual_seed(0)
    plain = LitClassifier(LeNet())
    model = LitClassifier(LeNet(), compile="reduce-overhead")
    model.load_state_dict(plain.state_dict())
    shapes = []

    def backend(graph, inputs):
        """As a graph on the device does: takes one shape, and writes all its results to the same place."""
        place = graph(*inputs)[0].detach().clone()
        shapes.append(tuple(place.shape))

        def replay(*arguments):
            result = graph(*arguments)[0]
            return (result if result.requires_grad else place.copy_(result),)

        return replay

    torch._dynamo.reset()
    model.net.compile(backend=backend, dynamic=False)
    batches = [torch.rand(size, 1, 28, 28) for size in (8, 8, 5, 9, 8)]
    for images in batches:
        torch.testing.assert_close(model(images), plain(images))
    trained = list(shapes)
    model.eval()
    with torch.no_grad():
        logits = [model(images) for images in batches]

        assert (trained, shapes) == ([(8, 10)], [(8, 10), (8, 10)])
        for images, found in zip(batches, logits, strict=True):
            torch.testing.assert_close(found, plain(images))


def test_cuda_graphs_do_not_sum_gradients():
    with pytest.raises(UserError, match=r"accumulate_grad_batches=2.* use --compile"):
        check_accumulation("reduce-overhead", 2)
    for compile, batches in ((True, 2), ("max-autotune-no-cudagraphs", 2), ("reduce-overhead", 1)):
        check_accumulation(compile, batches)


# Networks with all that computing a stage twice could spoil.
STATEFUL = [
    pytest.param(lambda: LeNet(batch_norm=True), 28, 16, id="lenet"),
    pytest.param(lambda: AlexNet(image_size=67, batch_norm=True), 67, 8, id="alexnet"),
    pytest.param(lambda: VGG(width_divisor=8, image_size=32, batch_norm=True), 32, 16, id="vgg11_small"),
    pytest.param(lambda: NiN(batch_norm=True), 67, 4, id="nin"),
    pytest.param(lambda: GoogLeNet(batch_norm=True), 32, 4, id="googlenet"),
]


@pytest.mark.parametrize(("build", "image_size", "batch_size"), STATEFUL)
def test_checkpointed_activations_change_memory_alone(build, image_size, batch_size):
    torch.manual_seed(0)
    plain = build()
    checkpointed = copy.deepcopy(plain)
    apply_activation_checkpointing(checkpointed)
    nets = [plain, checkpointed, copy.deepcopy(checkpointed), pickle.loads(pickle.dumps(checkpointed))]
    images, labels = torch.rand(batch_size, 1, image_size, image_size), torch.arange(batch_size) % 10
    kept, found = [], []
    for net in nets:
        torch.manual_seed(1)
        with LiveBytes() as live:
            logits = net(images)
        kept.append(live.now)
        F.cross_entropy(logits, labels).backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        found.append([logits, torch.rand(1), *gradients, *net.buffers()])

    for net, values in zip(nets[1:], found[1:], strict=True):
        assert list(net.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(values, found[0], strict=True))
    assert max(kept[1:3]) < 0.6 * kept[0]
    for net in nets:
        net.eval()
    torch.testing.assert_close(checkpointed(images), plain(images), rtol=0, atol=0)


def test_a_stage_that_overwrites_its_input_is_refused():
    net = nn.Sequential(nn.Sequential(nn.ELU(inplace=True), nn.Conv2d(1, 2, 3)))
    apply_activation_checkpointing(net)

    with pytest.raises(UserError, match="ELU changes its input in place"):
        net(torch.rand(1, 1, 8, 8))


def test_a_layer_in_place_after_a_pooling_stays_in_its_stage():
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ELU(inplace=True), nn.Conv2d(2, 2, 3), nn.MaxPool2d(2))
    )
    plain = copy.deepcopy(net)
    apply_activation_checkpointing(net)
    images = torch.rand(2, 1, 16, 16)

    expected, found = (torch.autograd.grad(one(images).square().sum(), list(one.parameters())) for one in (plain, net))

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_activations_that_can_not_be_checkpointed():
    with pytest.raises(ValueError, match=r"Linear has no nn\.Sequential with convolutions"):
        LitClassifier(nn.Linear(2, 2), checkpoint_activations=True)
    with pytest.raises(ValueError, match="compile can't be combined"):
        LitClassifier(LeNet(), compile=True, checkpoint_activations=True)
