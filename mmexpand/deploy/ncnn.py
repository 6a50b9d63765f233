"""The compact network as ncnn's two files, by pnnx."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExportError, UserValueError
from ..files import written_whole
from ..stack import check_installed
from ..surgery.train_mode import eval_mode
from .comparison import Reference, check_error
from .decoding import check_exportable
from .graph import first_line
from .network import Pixels, file_images


@torch.no_grad()
def export_ncnn(
    model: nn.Module,
    inputs: Tensor,
    out: str | os.PathLike,
    tolerance: float,
    *,
    pixels: Pixels | None = None,
) -> float:
    """Write the network, without decoding, in float32 for one image of this size.

    Its input is ``in0``, its outputs ``out0``, ``out1`` and so on, without the batch's axis.

    Args:
        model: a compact model; it is run in eval mode and left as it was.
        inputs: a real image, preprocessed, shape (1, C, H, W).
        out: the ``.param`` file; the weights are beside it, in ``.bin``. They are replaced once
            the comparison has passed.
        tolerance: largest error allowed, relative to the largest output.
        pixels: let the network take float32 pixels instead of normalised images.

    Returns:
        The largest error.

    Raises:
        ImportError: if pnnx or ncnn is missing.
        ValueError: if the model is expanded.
        ExportError: if pnnx cannot convert it; no file is written.
        RuntimeError: if the outputs differ by more than the tolerance; no file is written.
    """
    check_installed('ncnn', 'pnnx', 'ncnn')
    check_exportable(model)
    if pixels is not None and pixels.dtype != torch.float32:
        raise UserValueError('ncnn takes float32 pixels; leave out --uint8')
    out = Path(out)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        files = [stack.enter_context(written_whole(out.with_suffix(s))) for s in ('.param', '.bin')]
        reference = Reference(model, pixels)
        images = file_images(inputs, pixels)
        _convert(reference.network, images, *files)
        error = reference.raw_error(_run(*files, images), images)
        check_error('ncnn and PyTorch', error, tolerance, out)
    return error


def _convert(network: nn.Module, images: Tensor, param: Path, weights: Path) -> None:
    import pnnx

    with TemporaryDirectory() as folder:
        traced = Path(folder, 'network.pt')
        shape = ','.join(map(str, images.shape))
        # pnnx writes other files than ncnn's into the folder.
        command = [pnnx.EXEC_PATH, traced, f'inputshape=[{shape}]f32', 'fp16=0']
        command += [f'ncnnparam={param.resolve()}', f'ncnnbin={weights.resolve()}']
        try:
            torch.jit.trace(network, (images,), check_trace=False).save(traced)
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        except Exception as error:  # torch, mmcv, mmdet and mmseg raise many types.
            raise ExportError(f'pnnx cannot convert the network: {first_line(error)}') from error
    if not (param.exists() and weights.exists()):
        raise ExportError('pnnx cannot convert the network: it has written no ncnn files')


def _run(param: Path, weights: Path, images: Tensor) -> list[np.ndarray]:
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    # ncnn reports unknown layers on stderr, and continues.
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise ExportError("ncnn cannot read pnnx's files of the network")
    extractor = net.create_extractor()
    extractor.input('in0', ncnn.Mat(images[0].numpy()).clone())
    outputs = [extractor.extract(f'out{i}') for i in range(len(net.output_names()))]
    if any(status for status, _ in outputs):
        raise ExportError("ncnn cannot run pnnx's files of the network")
    return [np.array(value)[None] for _, value in outputs]
