"""What TensorBoard shows besides the curves: the network's graph, pictures, and the accuracy of each class.

TensorBoard sorts by name: curves, errors, filters, inputs, learning_rate, per_class_accuracy, speed, stages.
"""

import io
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn

from callbacks.confusion import Confusion
from callbacks.tensorboard import drawing
from inspection.graph import network_graph
from inspection.stages import stage_outputs
from pictures.feature_maps import feature_maps

INPUTS = 16
# A run draws its pictures about this many times: they take a hundred times the space of an epoch's scalars.
TIMES = 10


class TensorBoardPictures(Callback):
    """Fills TensorBoard's Images, Graphs and, if wanted, Histograms.

    All of it happens at the end of an epoch, on the first process; a training step costs nothing. The pictures are
    drawn after the first epoch, after every further tenth of the run (in a run without a set length after each power of
    two) and after the last epoch, so that the logs of a long run stay small.

    Args:
        confusion: The callback that counts which class is taken for which.
        histograms: Also log the weights, and the norms of the gradients over the steps of the epoch, of each layer.
            This does cost time in each step.
    """

    def __init__(self, confusion: Confusion, histograms: bool = False) -> None:
        self._confusion = confusion
        self._histograms = histograms
        self._gradient_norms: list[Tensor] = []
        self._inputs_shown = False
        self._validated: int | None = None  # step of a validation whose pictures are not drawn yet
        self._drawn = 0  # epochs that were over when pictures were last drawn

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the graph."""
        if not writes(trainer):
            return
        try:
            graph = network_graph(pl_module.net, _data(trainer).input_shape)  # type: ignore[arg-type]
        except NotImplementedError:
            return  # it needs data
        _writer(trainer).file_writer.add_event(Event(graph_def=graph.SerializeToString()))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        """Show the first training images as the network sees them: augmented, resized and normalised."""
        if self._inputs_shown:
            return
        self._inputs_shown = True
        if writes(trainer):
            images, labels = (part[:INPUTS].cpu() for part in batch)
            labels = labels if labels.dim() == 1 else labels.argmax(dim=1)  # probabilities, from a teacher
            names = [self._confusion.class_names[label] for label in labels.tolist()]
            show(trainer, "inputs/training_images", drawing.inputs(images, names), trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Keep the norms of the gradients, if histograms are wanted."""
        if self._histograms and writes(trainer):
            # In float16 a fused optimiser unscales the gradients itself, later.
            scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
            scaled = scaler and getattr(optimizer, "_step_supports_amp_scaling", False)
            norms = [torch.tensor(torch.nan) if p.grad is None else p.grad.norm() for p in pl_module.net.parameters()]  # type: ignore[union-attr]
            stacked = torch.stack([norm.to(pl_module.device) for norm in norms]).float()
            self._gradient_norms.append(stacked / scaler.get_scale() if scaled else stacked)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the accuracy of each class."""
        if trainer.sanity_checking or not writes(trainer):
            return
        self._validated = trainer.global_step - 1  # the step that the validation's scalars carry
        writer = _writer(trainer)
        for name, accuracy in self._confusion.class_accuracy.items():
            writer.add_scalar(f"per_class_accuracy/{name}", accuracy, self._validated)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the pictures if they are due."""
        if not writes(trainer):
            return
        if self._histograms:
            self._show_histograms(trainer, pl_module.net, trainer.global_step - 1)  # type: ignore[arg-type]
        if is_drawn(trainer.current_epoch + 1, trainer.max_epochs or -1):
            self._draw(trainer, pl_module)
            self._drawn = trainer.current_epoch + 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the pictures of the last epoch, which comes early if something stops the run."""
        # Training that has ended counts its last epoch as over.
        if writes(trainer) and 0 < trainer.current_epoch != self._drawn:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._validated is not None:
            self._draw_validation(trainer, self._validated)
            self._validated = None
        net: nn.Module = pl_module.net  # type: ignore[assignment]
        step = trainer.global_step - 1
        first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None:
            show(trainer, "filters/first_layer", drawing.filters(first.weight.detach().cpu()), step)
        data = _data(trainer)
        image = (data.val_set if len(data.val_set) else data.train_set).images[:1].to(pl_module.device)
        outputs = [found for found in stage_outputs(net, data.preprocess(image)) if found[2].dim() == 3]
        outputs = [found for found in outputs if found[2].shape[-1] > 1]  # with a height and a width
        for number, (name, kind, maps) in enumerate(outputs, start=1):
            shape = "x".join(map(str, maps.shape))
            show(trainer, f"stages/{number:02}_{name}_{kind}_{shape}", feature_maps(maps), step)

    def _draw_validation(self, trainer: pl.Trainer, step: int) -> None:
        """Draw the confusion matrix and the most confident mistakes."""
        confusion, names = self._confusion, self._confusion.class_names
        if len(names) <= drawing.MOST_CLASSES:
            show(trainer, "errors/confusion_matrix", drawing.confusion_matrix(confusion.matrix, names), step)
        wrong = confusion.mistakes
        tiles = _data(trainer).val_set.images[[mistake.image for mistake in wrong]]
        labels, guesses = ([names[getattr(mistake, part)] for mistake in wrong] for part in ("label", "guess"))
        sure = [mistake.probability for mistake in wrong]
        show(trainer, "errors/most_confident", drawing.mistakes(tiles, labels, guesses, sure), step)

    def _show_histograms(self, trainer: pl.Trainer, net: nn.Module, step: int) -> None:
        writer = _writer(trainer)
        norms = torch.stack(self._gradient_norms).cpu() if self._gradient_norms else None
        self._gradient_norms.clear()
        for index, (name, parameter) in enumerate(net.named_parameters()):
            weights = parameter.detach().float().cpu()
            if weights.isfinite().all():
                writer.add_histogram(f"weights/{name}", weights, step)
            if norms is not None and len(finite := norms[:, index][norms[:, index].isfinite()]):
                writer.add_histogram(f"gradient_norms/{name}", finite, step)


def is_drawn(epoch: int, max_epochs: int) -> bool:
    """Whether pictures are drawn after an epoch.

    Args:
        epoch: Its number, from 1.
        max_epochs: Length of the run; -1 if it has none.
    """
    if max_epochs < 1:
        return epoch & (epoch - 1) == 0
    return epoch in (1, max_epochs) or epoch % -(-max_epochs // TIMES) == 0


def show(trainer: pl.Trainer, tag: str, picture: Image.Image, step: int) -> None:
    """Add a picture to TensorBoard's Images; for a process that `writes`."""
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)  # SummaryWriter.add_image compresses harder, four times as long
    image = Summary.Image(height=picture.height, width=picture.width, colorspace=3)
    image.encoded_image_string = content.getvalue()
    _writer(trainer)._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def writes(trainer: pl.Trainer) -> bool:
    """Whether there is a TensorBoard log and this process keeps it."""
    return trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger)


def _writer(trainer: pl.Trainer) -> Any:
    return trainer.logger.experiment  # type: ignore[union-attr]


def _data(trainer: pl.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
