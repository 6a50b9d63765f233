"""Messages to the user."""

import logging

from mmengine.logging import print_log


def log(message: str, level: int = logging.INFO) -> None:
    """Write a message to the Runner's log."""
    print_log(message, logger='current', level=level)
