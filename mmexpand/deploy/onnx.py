"""The compact network as an ONNX file, written after a comparison with PyTorch."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ExportError, UserRuntimeError, UserValueError
from ..files import written_whole
from ..stack import check_installed
from ..surgery.fake_quantisation import fake_quantised
from ..surgery.train_mode import eval_mode
from .comparison import Reference, batches, check_error, compare_file
from .decoding import Boxes, Classes, check_exportable, decoder_of
from .graph import attach, first_line, open_axes, trace
from .int8 import Int8, Int8Report, Int8Search, by_head
from .layers import chosen_layers, run_modules, weighted_layers
from .network import Pixels, file_images
from .runtimes import onnxruntime_run

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-4
"""Largest difference that rounding in float32 explains, relative to the largest output."""
TRAINED_TOLERANCE = 0.1
"""Largest root mean square difference, relative to the outputs', that ties explain. Networks of few
layers have no difference; YOLOX-nano has 0.04."""
AGREEMENT = 0.99
"""Smallest share of predictions equal to the framework's: rounding may change near ties."""


@dataclass(frozen=True)
class OnnxReport:
    """An exported file and its comparison with PyTorch.

    Attributes:
        path: the file.
        input_shape: shape of the image in the trace, with the batch size.
        output_shapes: shapes of its outputs, by their names in the file.
        max_error: largest difference of the raw outputs, relative to the largest magnitude of the
            same output, over batches of one and of two images, and two more sizes if the size is
            dynamic. For an int8 file with trained ranges PyTorch is fake-quantised.
        agreement: share of the predictions (boxes, or pixels' classes) equal to the framework's
            own; None for raw outputs.
        int8: errors of the int8 layers; None for a float32 file.
    """

    path: Path
    input_shape: tuple[int, ...]
    output_shapes: dict[str, tuple[int, ...]]
    max_error: float
    agreement: float | None
    int8: Int8Report | None = None


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    inputs: Tensor,
    out: str | os.PathLike,
    tolerance: float = TOLERANCE,
    *,
    raw: bool = False,
    logits: bool = False,
    pixels: Pixels | None = None,
    dynamic_size: bool = False,
    int8: Int8 | None = None,
) -> OnnxReport:
    """Write the compact network as ONNX if ONNX Runtime's outputs equal PyTorch's.

    The file of a detector gives ``boxes``, ``scores`` and ``labels``, the file of a segmentor
    ``classes`` or ``logits``, decoded by their own heads. The file of a classifier gives raw
    outputs. The batch size is dynamic.

    Args:
        model: a compact model; it is run in eval mode and left as it was.
        inputs: a real image, preprocessed, shape (1, C, H, W).
        out: the file; it is replaced once the comparison has passed.
        tolerance: largest relative error allowed.
        raw: whether to leave out the decoding.
        logits: whether a segmentor returns logits at the size of the input instead of classes.
        pixels: let the file take pixels instead of normalised images.
        dynamic_size: whether the file accepts any height and width.
        int8: options to quantise convolutions and matrix products. Differences are reported, and
            an error only if the outputs no longer depend on the image.

    Raises:
        ImportError: if onnx or onnxruntime is missing.
        ValueError: if the model is expanded.
        ExportError: if the file cannot hold such a model; no file is written.
        RuntimeError: if the outputs differ by more than the tolerance; no file is written.
    """
    check_installed('ONNX', 'onnx', 'onnxruntime')
    import onnx

    check_exportable(model)
    if int8 is not None:
        _check_int8(model, inputs, int8, dynamic_size)
    out = Path(out)
    report: Int8Report | None = None
    with eval_mode(model), written_whole(out) as temporary:
        reference = Reference(model, pixels)
        images = file_images(inputs, pixels)
        with _in_words(model, 'it does not run on images alone'):
            outputs = reference.network(images)
        decoder = None if raw else decoder_of(model, inputs, logits)
        network = _trace_network(reference, images, outputs, dynamic_size)
        onnx.save(network, str(temporary))
        error = _raw_error(reference, temporary, batches(images, dynamic_size))
        if not error <= tolerance:
            _check_repeatable(reference, images, outputs)
        check_error('ONNX Runtime and PyTorch', error, tolerance, out)
        decoding = None
        if decoder is not None:
            decoding = _trace_decoder(decoder, reference, images, dynamic_size)

        def save(network: 'ModelProto') -> None:
            if decoder is not None:
                attach(network, decoding, decoder.per_image)
            onnx.save(network, str(temporary))

        if int8 is not None:
            network, report = _quantise(network, reference, images, int8, save, temporary)
            onnx.save(network, str(temporary))
            with _as_trained(reference, images, int8, report):
                error = _raw_error(reference, temporary, batches(images, dynamic_size))
                if int8.ranges is not None:
                    _check_trained(reference, temporary, images, out)
            _check_chance(report, out)
        save(network)
        agreement = None
        if decoder is not None:
            agreement = _agreement(reference, temporary, inputs)
            if int8 is None:
                _check_agreement(agreement, out)
        found = onnxruntime_run(temporary)(images.numpy())
    shapes = {o.name: f.shape for o, f in zip(network.graph.output, found, strict=True)}
    return OnnxReport(out, tuple(inputs.shape), shapes, error, agreement, report)


def _check_int8(model: nn.Module, inputs: Tensor, int8: Int8, dynamic_size: bool) -> None:
    """Check the layers that stay float32, and the size of the calibration images.

    Raises:
        ValueError: for an unknown layer, and for images that the file cannot take.
    """
    chosen_layers(weighted_layers(model), int8.keep)
    sizes = {tuple(image.shape[1:]) for image in int8.images}
    if len(sizes) > 1:
        raise UserValueError(
            f'calibration images have shapes {min(sizes)} and {max(sizes)}: resize them to one'
        )
    if sizes - {tuple(inputs.shape[1:])} and not dynamic_size:
        raise UserValueError(
            f'calibration images of shape {min(sizes)} do not fit the input '
            f'{tuple(inputs.shape[1:])}: resize them, or use dynamic_size=True'
        )


def _quantise(
    network: 'ModelProto',
    reference: Reference,
    images: Tensor,
    int8: Int8,
    save: Callable[['ModelProto'], None],
    path: Path,
) -> tuple['ModelProto', Int8Report]:
    """Return the int8 network, without decoding, and its errors.

    Args:
        network: the float32 network.
        reference: the model in PyTorch.
        images: images of the file.
        int8: options.
        save: writes a network with its decoding to ``path``, for ``int8.accepts``.
        path: the file.
    """
    calibration = [file_images(image, reference.pixels) for image in int8.images]
    modules = run_modules(reference.network, images)
    search = Int8Search(network, reference.model, modules, calibration, int8)

    def accepts(graph: 'ModelProto') -> bool:
        save(graph)
        return int8.accepts(path)

    return search.choose(accepts)


def _agreement(reference: Reference, path: Path, inputs: Tensor) -> float:
    """Return the share of a file's predictions that are equal to the framework's."""
    with _in_words(reference.model, 'its decoding fails'):
        run = onnxruntime_run(path)
        return compare_file(run, reference.model, inputs, pixels=reference.pixels)


def _check_agreement(agreement: float, out: Path) -> None:
    """Raise RuntimeError if less than ``AGREEMENT`` of the predictions are equal."""
    if agreement < AGREEMENT:
        raise UserRuntimeError(
            f'only {agreement:.2%} of the predictions are those of PyTorch, required '
            f'{AGREEMENT:.0%}; {out} was not written'
        )


def _as_trained(
    reference: Reference, images: Tensor, int8: Int8, report: Int8Report
) -> AbstractContextManager:
    """Fake-quantise PyTorch's model in this context if the export uses ranges of QuantHook."""
    if int8.ranges is None:
        return nullcontext()
    ranges = {name: r for name, r in int8.ranges.items() if name not in report.kept}
    run = partial(reference.raw_outputs, images)
    return fake_quantised(reference.model, int8.target, ranges, run)


def _check_trained(reference: Reference, path: Path, images: Tensor, out: Path) -> None:
    """Check that a file computes what was trained with the rounding of int8.

    Raises:
        RuntimeError: if it does not.
    """
    found = [value[None] for value in onnxruntime_run(path)(images.numpy())]
    expected = [value.numpy()[None] for value in reference.raw_outputs(images)]
    sizes = by_head(expected, [0] * len(expected))
    error = max(e / max(s, 1e-12) for e, s in zip(by_head(found, expected), sizes, strict=True))
    if not error <= TRAINED_TOLERANCE:
        raise UserRuntimeError(
            'ONNX Runtime in int8 and PyTorch with the trained ranges differ by '
            f'{error:.3g} of the outputs (root mean square), allowed {TRAINED_TOLERANCE:g}; {out} '
            'was not written'
        )


def _check_chance(report: Int8Report, out: Path) -> None:
    """Check that the outputs of an int8 network depend on the image as PyTorch's do.

    Raises:
        ExportError: if they do not; the message names the layers with the largest errors.
    """
    if report.error < 1:
        return
    worst = [layer for layer in report.layers if layer.name not in report.kept][:3]
    listed = '; '.join(f'{layer.name} ({layer.error:.2g} alone: {layer.reason})' for layer in worst)
    raise ExportError(
        f'the int8 network is near chance: its error is {report.error:.2g}, and 1 is chance; {out} '
        f'was not written. The layers with the largest errors are {listed}. Keep them in float32 '
        'with --int8-keep, or use --int8-keep auto'
    )


def _check_repeatable(reference: Reference, images: Tensor, outputs: Sequence[Tensor]) -> None:
    """Check that a network gives the same outputs for the same images.

    Raises:
        ExportError: if it does not.
    """
    again = reference.network(images)
    if not all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True)):
        raise ExportError(
            f'{type(reference.model).__name__} gives different outputs for the same images, '
            'because it draws random numbers in eval mode, as SegNeXt does with '
            'ham_kwargs.rand_init=True (the default). Train and export it without random numbers'
        )


def _trace_network(
    reference: Reference, images: Tensor, outputs: Sequence[Tensor], dynamic_size: bool
) -> 'ModelProto':
    names = [f'output_{index}' for index in range(len(outputs))] if outputs[1:] else ['output']
    axes = (0, 2, 3) if dynamic_size else (0,)
    dynamic = {name: open_axes(name, o, axes) for name, o in zip(names, outputs, strict=True)}
    dynamic['input'] = {axis: {0: 'batch', 2: 'height', 3: 'width'}[axis] for axis in axes}
    return trace(reference.network, [images], ['input'], names, dynamic)


def _trace_decoder(
    decoder: Boxes | Classes, reference: Reference, images: Tensor, dynamic_size: bool
) -> 'ModelProto':
    raw = decoder.example(reference.raw_outputs(images))
    names = [f'raw_{index}' for index in range(len(raw))]
    axes = (() if decoder.per_image else (0,)) + ((2, 3) if dynamic_size else ())
    dynamic = {name: open_axes(name, o, axes) for name, o in zip(names, raw, strict=True)}
    if not decoder.per_image:
        first = 1 if decoder.names == ('classes',) else 2
        sizes = {first: 'height', first + 1: 'width'} if dynamic_size else {}
        dynamic[decoder.names[0]] = {0: 'batch', **sizes}
    size = torch.tensor(images.shape[-2:])
    return trace(decoder, [size, *raw], ['size', *names], decoder.names, dynamic, True)


def _raw_error(reference: Reference, path: Path, images: list[Tensor]) -> float:
    with _in_words(reference.model, 'ONNX Runtime does not take the graph'):
        run = onnxruntime_run(path)
    errors = []
    for batch in images:
        with _in_words(reference.model, f'the graph fails on images of shape {tuple(batch.shape)}'):
            found = run(batch.numpy())
        errors.append(reference.raw_error(found, batch))
    return max(errors)


@contextmanager
def _in_words(model: nn.Module, what: str) -> Iterator[None]:
    """Turn any error of the model or ONNX Runtime into one that names the model."""
    try:
        yield
    except Exception as error:  # ONNX Runtime raises many private types.
        raise ExportError(
            f'{type(model).__name__} cannot be exported to ONNX: {what} ({first_line(error)})'
        ) from error
