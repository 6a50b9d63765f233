"""Read weight files of darknet."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserValueError


def load_darknet_weights(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Read a darknet weight file into the state dict of a model.

    The file is a header (three int32: major, minor and revision of the format; the number of
    images seen, int32 before version 0.2 and int64 from it on) and then, for every convolution in
    the order of the network, its biases and its weights (output, input, height, width) as
    little-endian float32. Source: ``load_weights_upto`` in darknet's ``parser.c``; AlexeyAB's
    branch writes revision 5. Convolutions with batch normalisation, which store more, are not
    read.

    Args:
        path: The weight file.
        model: The network the file belongs to. Its :class:`torch.nn.Conv2d` layers, in the order
            in which they are registered, are the file's; it is not changed.

    Returns:
        Weights and biases under the model's keys, float32.

    Raises:
        ValueError: The size of the file does not fit the model's convolutions, its header is not
            darknet's, or its values are not finite; or the model has parameters that such a file
            does not store.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    keys = {f'{name}.{kind}' for name in convs for kind in ('weight', 'bias')}
    if other := keys.symmetric_difference(model.state_dict()):
        raise UserValueError(
            f'darknet weights do not fit {type(model).__name__}: it must consist of convolutions '
            f'with bias only, but it lacks, or has in addition, {sorted(other)}; use the config of '
            'a network without norms'
        )
    num_floats = sum(conv.weight.numel() + conv.bias.numel() for conv in convs.values())
    floats = _read_floats(path, num_floats, f'{len(convs)} convolutions')

    state_dict = {}
    for name, conv in convs.items():
        for kind in ('bias', 'weight'):
            parameter = getattr(conv, kind)
            values, floats = floats[: parameter.numel()], floats[parameter.numel() :]
            state_dict[f'{name}.{kind}'] = torch.from_numpy(values.copy()).view(parameter.shape)
    return state_dict


def _read_floats(path: str | Path, num_floats: int, layers: str) -> np.ndarray:
    """Return all floats after the header, once header and size are checked."""
    data = Path(path).read_bytes()
    if len(data) < 12:
        raise UserValueError(f'{path}: {len(data)} bytes, too short for a darknet weight file.')
    major, minor, revision = struct.unpack_from('<3i', data)
    if major != 0 or not 0 <= minor < 10 or not 0 <= revision < 10:
        raise UserValueError(
            f'{path}: not a darknet weight file: the header gives format version '
            f"{major}.{minor}.{revision}, darknet writes 0.1.0 or 0.2.0, AlexeyAB's 0.2.5."
        )
    header = 16 if minor < 2 else 20
    expected = header + 4 * num_floats
    if len(data) != expected:
        raise UserValueError(
            f'{path}: expected {expected} bytes ({header} of header and {num_floats} float32 '
            f'for {layers}), found {len(data)}: the file is '
            + ('truncated or ' if len(data) < expected else '')
            + "another network's. Give the config of the network it was trained with."
        )
    floats = np.frombuffer(data, '<f4', offset=header).astype(np.float32)
    if not np.isfinite(floats).all():
        raise UserValueError(f'{path}: holds values that are not finite; the file is corrupt.')
    return floats
