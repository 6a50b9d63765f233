"""What cannot be exported."""

from ..errors import UserError


class ExportError(UserError, ValueError):
    """A model that cannot be taken out of PyTorch; the message says why and what can be done."""
