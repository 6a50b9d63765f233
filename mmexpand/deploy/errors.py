"""Errors of an export."""

from ..errors import UserError


class ExportError(UserError, ValueError):
    """A model that cannot be exported; the message gives the reason and the fix."""
