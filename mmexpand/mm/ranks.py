"""Steps that several processes take together, and fail together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process

Result = TypeVar('Result')


@contextmanager
def together() -> Iterator[None]:
    """A step without communication that fails on every rank as soon as it fails on one.

    A rank that went on alone would wait for the others for ever.

    Raises:
        RuntimeError: where only other ranks failed; it names the first of them.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    reasons = all_gather_object(None if own is None else describe(own))
    if own is not None:
        raise own
    for rank, reason in enumerate(reasons):
        if reason:
            raise RuntimeError(f'rank {rank}: {reason}')


def on_main(action: Callable[[], Result]) -> Result:
    """Do something on the main process alone; all ranks get its result, or its failure."""
    result: list = [None]
    with together():
        if is_main_process():
            result[0] = action()
    broadcast_object_list(result)
    return result[0]


def describe(error: BaseException) -> str:
    """An error in one line: what it says, and its kind unless that is said in words."""
    text = ' '.join(str(error).split())
    own = type(error).__module__.startswith('mmexpand') or type(error) is RuntimeError
    return text if own and text else f'{type(error).__name__}: {text}'
