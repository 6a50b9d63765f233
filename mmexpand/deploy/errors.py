"""What cannot be exported."""


class ExportError(ValueError):
    """A model that cannot be taken out of PyTorch; the message says why and what can be done."""
