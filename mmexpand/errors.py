"""Errors that a user can fix. Tools print their message without a traceback."""


class UserError(Exception):
    """An error that a user can fix: the message names the problem, the value and the fix."""


class UserValueError(UserError, ValueError):
    """An option or argument with a value that cannot be used."""


class UserTypeError(UserError, TypeError):
    """An option or argument of a type that cannot be used."""


class UserRuntimeError(UserError, RuntimeError):
    """A combination that is unsupported, or a step that failed for a reason outside the code."""


class UserImportError(UserError, ImportError):
    """A package that is missing, too old or too new."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file that is missing."""


class UserPermissionError(UserError, PermissionError):
    """A file or folder that cannot be written to."""


class ExportError(UserError, ValueError):
    """A model that cannot be exported; the message gives the reason and the fix."""
