"""Steps that several processes take together, and fail together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mmengine.dist import all_gather_object, broadcast, broadcast_object_list, is_main_process
from torch import Tensor, nn

from ..errors import UserRuntimeError
from ..surgery import named_units

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
            raise UserRuntimeError(f'rank {rank}: {reason}')


def on_main(action: Callable[[], Result]) -> Result:
    """Do something on the main process alone; all ranks get its result, or its failure."""
    result = None
    with together():
        if is_main_process():
            result = action()
    return from_main(result)


def from_main(value: Result) -> Result:
    """What the main process has, on all ranks."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def broadcast_state(model: nn.Module) -> None:
    """Give every rank's model the parameters and buffers of the main process's."""
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            broadcast(value)


def start_alike(model: nn.Module) -> None:
    """Give every rank the main process's factors.

    mmengine broadcasts what a model's own initialisation gives. Factors of a kernel that is loaded
    from a compact checkpoint, or that ``init_weights`` has written to a unit, are drawn later, and
    by each rank for itself.

    Args:
        model: without a distributed wrapper.
    """
    units = named_units(model).values()
    for unit in units:
        unit.take_offered()
    if units:
        broadcast_state(model)
    for unit in units:
        unit.forget_products()


def describe(error: BaseException) -> str:
    """An error in one line: what it says, and its kind unless that is said in words."""
    text = ' '.join(str(error).split())
    own = type(error).__module__.startswith('mmexpand') or type(error) is RuntimeError
    return text if own and text else f'{type(error).__name__}: {text}'
