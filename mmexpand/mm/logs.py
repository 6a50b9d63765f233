"""Messages to the user."""

import logging

from mmengine.logging import print_log


def log(message: str, level: int = logging.INFO) -> None:
    """Log to the Runner's logger."""
    print_log(message, logger='current', level=level)
