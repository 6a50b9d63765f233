"""The compact network as a program of torch.export."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..files import written_whole
from ..surgery.train_mode import eval_mode
from .comparison import Reference, batches, check_error
from .decoding import check_exportable
from .graph import first_line
from .network import Pixels, file_images


@torch.no_grad()
def export_program(
    model: nn.Module,
    inputs: Tensor,
    out: str | os.PathLike,
    tolerance: float,
    *,
    pixels: Pixels | None = None,
) -> float:
    """Write the network, without decoding, as a ``.pt2`` that ``torch.export.load`` reads.

    The batch size is dynamic. (The number of boxes depends on the image, which torch.export
    cannot express.)

    Args:
        model: a compact model; it is run in eval mode and left as it was.
        inputs: a real image, preprocessed, shape (1, C, H, W).
        out: the file; it is replaced once the comparison has passed.
        tolerance: largest error allowed, relative to the largest output.
        pixels: let the program take pixels instead of normalised images.

    Returns:
        The largest error.

    Raises:
        ValueError: if the model is expanded.
        ExportError: if torch cannot export it; no file is written.
        RuntimeError: if the outputs differ by more than the tolerance; no file is written.
    """
    check_exportable(model)
    out = Path(out)
    with eval_mode(model), written_whole(out) as temporary:
        reference = Reference(model, pixels)
        given = batches(file_images(inputs, pixels), dynamic_size=False)
        try:
            program = torch.export.export(
                reference.network,
                (given[1],),
                dynamic_shapes=({0: torch.export.Dim('batch')},),
                strict=False,
            )
            torch.export.save(program, temporary)
        except Exception as error:  # torch, mmcv, mmdet and mmseg raise many types.
            raise ExportError(
                f'{type(model).__name__} cannot be exported by torch.export: {first_line(error)}; '
                f'{out} was not written'
            ) from error
        run = torch.export.load(temporary).module()
        error = max(reference.raw_error([o.numpy() for o in run(b)], b) for b in given)
        check_error('the program and the model', error, tolerance, out)
    return error
