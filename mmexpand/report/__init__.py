"""Pages that show a run, or a study: HTML that opens anywhere."""

from ..stack import check_installed


def check_report() -> None:
    """Refuse to promise a page that could not be written.

    Raises:
        ImportError: naming what is missing.
    """
    check_installed('a report', 'jinja2', 'plotly')
