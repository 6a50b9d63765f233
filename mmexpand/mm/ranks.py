"""Steps that all processes take together and that fail on all of them."""

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
    """Run a step without communication that fails on every rank if it fails on one.

    Otherwise the ranks that did not fail would wait for the others forever.

    Raises:
        RuntimeError: on ranks that did not fail, naming the first rank that did.
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
    """Run an action on the main process only and return its result, or fail, on all ranks."""
    result = None
    with together():
        if is_main_process():
            result = action()
    return from_main(result)


def from_main(value: Result) -> Result:
    """Return the main process's value on all ranks."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def broadcast_state(model: nn.Module) -> None:
    """Broadcast the main process's parameters and buffers to the models of all ranks."""
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            broadcast(value)


def start_alike(model: nn.Module) -> None:
    """Broadcast the main process's factors to all ranks.

    mmengine broadcasts initialised weights. But the factors of a kernel from a compact checkpoint,
    or of a kernel that ``init_weights`` writes to a unit, are drawn later, on each rank.

    Args:
        model: the model, without a distributed wrapper.
    """
    units = named_units(model).values()
    for unit in units:
        unit.take_offered()
    if units:
        broadcast_state(model)
    for unit in units:
        unit.forget_products()


def describe(error: BaseException) -> str:
    """Return an error's message in one line, with its type unless the message needs none."""
    text = ' '.join(str(error).split())
    own = type(error).__module__.startswith('mmexpand') or type(error) is RuntimeError
    return text if own and text else f'{type(error).__name__}: {text}'
