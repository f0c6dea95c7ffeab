"""Writes a trained classifier, preprocessing included, as ONNX or torch.export, and checks what was written."""

import importlib
import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from datamodules import DatasetError, FashionMNISTDataModule, PicturesDataModule
from datamodules.files.finding import load, prepare
from errors import MissingPackage, RunError, UserError, one_line, written_aside
from lit_modules import LitClassifier
from weights.trained import load_trained

CHECKED_IMAGES = 1000
TOLERANCE = 1e-4  # of probabilities
SINGLE = 20  # of these images also one by one
NOISE_IMAGES = 60  # to check with where there is no Fashion-MNIST
BATCH = 100
Predict = Callable[[Tensor], Any]  # to probabilities, or a tuple of them and scores


class Exported(nn.Module):
    """Preprocessing, network and calibrated softmax in one module.

    Args:
        classifier: The trained network and its temperature.
        data: Knows how the network wants its images.
    """

    def __init__(self, classifier: LitClassifier, data: FashionMNISTDataModule) -> None:
        super().__init__()
        self.net = classifier.net
        self.temperature = classifier.temperature
        self.out_of_distribution = classifier.out_of_distribution
        self._preprocess = data.preprocess

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (N, 28, 28), or (N, C, S, S) of a folder, uint8 to probabilities (N, num_classes) float32.

        And, where the checkpoint has it, to the score (N,) of `OutOfDistribution`: above 1 the network is not sure.
        """
        logits = self.net(self._preprocess(images)).float()
        probabilities = (logits / self.temperature).softmax(dim=1)
        if self.out_of_distribution is None:
            return probabilities
        return probabilities, self.out_of_distribution.score(logits)


def export(ckpt_path: Path, format: str, output: Path, data_dir: Path | None, trust: bool) -> str:
    """Export a checkpoint.

    Args:
        ckpt_path: A checkpoint of a training run.
        format: "onnx" or "torch_export".
        output: The file to write; it is replaced only by a file that passed the check.
        data_dir: Folder of the data set; None takes the training run's.
        trust: Let the checkpoint name any class.

    Returns:
        What was written: agreement, size and latency, as text.

    Raises:
        UserError: If the checkpoint, the data set or an optional package can't be used.
        RunError: If the file can't be written, or computes something different from the checkpoint.
    """
    write, read = {"onnx": (_write_onnx, _read_onnx), "torch_export": (_write_torch_export, _read_torch_export)}[format]
    if format == "onnx":
        _check_packages("onnx", "onnxscript", "onnxruntime")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    classifier, data, checkpoint = load_trained(ckpt_path, trust)
    metadata = _metadata(str(checkpoint.get("recipe", "")), classifier.temperature, data)
    images = _test_images(data, data_dir)
    kind = "images of noise" if isinstance(data, PicturesDataModule) else "test images"
    module = Exported(classifier, data).eval()
    # Weights in the usual order of dimensions, so that other programs can choose their own.
    module.to(memory_format=torch.contiguous_format)

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(output) as written:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's exporters warn about themselves
                example = images[:2].clone()  # a view would be stored with all images
                try:
                    write(module, example, written, metadata)
                except OSError:
                    raise
                except Exception as error:  # PyTorch's exporters raise many things
                    net, why = type(classifier.net).__name__, one_line(str(error))[:300]
                    raise RunError(f"{net} can't be exported as {format}: {why}") from None
                exported = read(written)
            with torch.no_grad():
                lines = _check(Exported(classifier, data).eval(), exported, images, kind)
    except OSError as error:
        raise RunError(f"{output} can't be written: {error.strerror or error}") from None
    return "\n".join([f"Wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", *lines])


def _check_packages(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise MissingPackage("--format onnx needs", name) from None


def _metadata(recipe: str, temperature: float, data: FashionMNISTDataModule) -> dict[str, str]:
    """The exported file's metadata."""
    shape = "28, 28), grey, light on dark"
    if isinstance(data, PicturesDataModule):
        size = data.stored_size
        shape = f"{data.hparams['channels']}, {size}, {size}), {'RGB' if data.hparams['channels'] == 3 else 'grey'}"
        shape += {"crop": ", cropped to squares", "pad": ", padded with black"}.get(data.hparams["fit"], ", stretched")
    return {
        "class_names": json.dumps(data.class_names),
        "recipe": recipe,
        "temperature": repr(temperature),
        "input": f"images: uint8 (N, {shape}",
        "output": f"probabilities: float32 (N, {len(data.class_names)}); out_of_distribution, where it was fitted: "
        "float32 (N), above 1 for images stranger than 95 % of the validation images",
    }


def _test_images(data: FashionMNISTDataModule, data_dir: Path | None) -> Tensor:
    if isinstance(data, PicturesDataModule):  # a checkpoint exports alone, without its folder
        shape = NOISE_IMAGES, data.hparams["channels"], data.stored_size, data.stored_size
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        images, _ = load(prepare(data_dir or data.data_dir), "test")
    except DatasetError as error:
        raise UserError(f"the check needs the test images: {error}") from None
    return images[:CHECKED_IMAGES]


def _check(checkpoint: Predict, exported: Predict, images: Tensor, kind: str = "test images") -> list[str]:
    """Compare the two on single images and on batches; returns agreement and speed as lines.

    Raises:
        RunError: If a class differs, or a probability by more than the tolerance.
    """
    outputs, alone, batched = [], [], []
    for predict in (checkpoint, exported):
        first = [_timed(predict, images[index : index + 1]) for index in range(SINGLE)]
        rest = [_timed(predict, batch) for batch in images[SINGLE:].split(BATCH)]
        outputs.append([torch.cat(parts) for parts in zip(*(output for output, _ in first + rest), strict=True)])
        alone.append(statistics.median(seconds for _, seconds in first))
        batched.append((len(images) - SINGLE) / sum(seconds for _, seconds in rest))
    (expected, *score), (given, *score_given) = outputs
    difference = float((given - expected).abs().max())
    others = int((given.argmax(dim=1) != expected.argmax(dim=1)).sum())
    scores_agree = all(map(partial(torch.allclose, rtol=1e-3, atol=1e-3), score, score_given))
    if others or not difference <= TOLERANCE or not scores_agree:
        raise RunError(
            f"the exported file differs from the checkpoint: another class on {others} of {len(images)} {kind}, "
            f"probabilities by up to {difference:.1e}, scores {'alike' if scores_agree else 'too'}; nothing was written"
        )
    return [
        f"Checked on {len(images):,} {kind}: same class on all, probabilities within {difference:.1e}",
        f"Latency of one image: {alone[1] * 1000:.2f} ms (checkpoint in PyTorch: {alone[0] * 1000:.2f} ms), CPU",
        f"In batches of {min(BATCH, len(images) - SINGLE)}: {batched[1]:,.0f} images/s "
        f"(checkpoint in PyTorch: {batched[0]:,.0f})",
    ]


def _timed(predict: Predict, images: Tensor) -> tuple[tuple[Tensor, ...], float]:
    start = time.perf_counter()
    outputs = predict(images)
    return outputs if isinstance(outputs, tuple) else (outputs,), time.perf_counter() - start


def _write_onnx(module: nn.Module, example: Tensor, path: Path, metadata: dict[str, str]) -> None:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities", *(["out_of_distribution"] if module.out_of_distribution else [])],
        dynamic_shapes={"images": {0: Dim("N")}},
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    aside = path.with_name(f"{path.name}.data")  # PyTorch's name for the weights of a network too large for one file
    try:
        program.save(path)
        if aside.exists():
            raise RunError("it is too large for one file; --format torch_export has no such limit")
    finally:
        aside.unlink(missing_ok=True)


def _read_onnx(path: Path) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def _write_torch_export(module: nn.Module, example: Tensor, path: Path, metadata: dict[str, str]) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes={"images": {0: Dim("N")}})
    # Not to the file: PyTorch aborts the process on a full disk, and takes only ASCII names on Windows.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(content.getbuffer())


def _read_torch_export(path: Path) -> Predict:
    with path.open("rb") as file:
        module: Any = torch.export.load(file).module()

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return predict
