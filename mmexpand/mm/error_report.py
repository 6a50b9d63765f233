"""Messages for errors that a user can fix."""

import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import Registry

from ..core.names import near_matches
from ..errors import UserError, UserValueError
from ..surgery import VerificationError
from ..surgery.checkpoint import describe_blocked
from .compat import being_built
from .datasets import no_samples, text_classes


def explain(error: Exception) -> str | None:
    """Return the message for an error that a user can fix, or None for any other error.

    A user can fix every ``UserError``, errors of the system about a file, errors of torch about a
    checkpoint, errors while an object of the config is built, and labels out of range.

    Args:
        error: the error, with its traceback.
    """
    if isinstance(error, UserError):
        return words(error)
    if isinstance(error, UnpicklingError):
        return f'a checkpoint that the config names {describe_blocked(error) or words(error)}'
    built = being_built(error.__traceback__)
    if built is not None:
        return _explain_building(error, *built)
    label = re.fullmatch(r'Target (-?\d+) is out of bounds\.', str(error))
    if label:
        return (
            f'the annotations have a label {label[1]}, but the network has no such class: set '
            'num_classes, or give ignored pixels the ignore_index of the loss'
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    return None


@contextmanager
def suits_shape(shape: Sequence[int]) -> Iterator[None]:
    """Raise ValueError that names the image size if a network fails in this context.

    Args:
        shape: height and width of the images in pixels, as the user gave them; a wrong size is
            the most common reason.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, VerificationError):
            raise
        height, width = shape
        raise UserValueError(
            f'the network cannot be run on images of {height}x{width}: {with_type(error)}; set '
            'another size with --shape'
        ) from error


def _explain_building(error: Exception, kind: Any, arguments: dict, registry: Registry) -> str:
    name = getattr(kind, '__name__', kind)
    if isinstance(error, KeyError) and isinstance(kind, str):
        known = [*registry.module_dict, *(registry.parent.module_dict if registry.parent else ())]
        near = near_matches(kind, known, otherwise='')
        return (
            f'the registry {registry.name!r} and its parent have no {kind}; {near}; add its module '
            'to custom_imports'
        )
    if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):
        return f'{name} cannot be built as the config says: {with_type(error)}'
    if words := text_classes(arguments):
        return f'{name} cannot be built: {words}'
    if 'need at least one array' in str(error):  # mmengine concatenates the samples.
        return no_samples(name, arguments.get('ann_file'), arguments.get('data_prefix'))
    path = _file_in_hand(error) or arguments.get('ann_file') or arguments.get('data_root', '')
    return f'{name} cannot read {path}: {with_type(error)}; fix the file, or remove it'


def _file_in_hand(error: Exception) -> str | None:
    """Return the file that a data set was reading when it could not be built."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    while frames and frames[-1].f_code.co_name != 'build_from_cfg':
        held = [value for value in frames.pop().f_locals.values() if isinstance(value, str)]
        files = [value for value in held if os.path.isfile(value)]
        if files:
            return files[-1]
    return None


def with_type(error: Exception) -> str:
    """Return an error's message in one paragraph with its type, as foreign messages need it."""
    text = words(error)
    return text if isinstance(error, OSError) else f'{text} ({type(error).__name__})'


def words(error: Exception) -> str:
    """Return an error's message in one paragraph; from a loader's worker, its last line only."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if text.startswith('Caught '):
        text = re.sub(r'^\S+: ', '', text.strip().splitlines()[-1])
    return ' '.join(text.split())
