"""HTML pages of a run and of a study, which open without a server."""

from ..stack import check_installed


def check_report() -> None:
    """Check that the packages that write pages are installed.

    Raises:
        ImportError: if a package is missing; the message names it.
    """
    check_installed('a report', 'jinja2', 'plotly')
