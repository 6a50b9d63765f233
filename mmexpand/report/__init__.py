"""Pages that show a run, or a study: HTML that opens anywhere."""

from importlib.util import find_spec


def check_installed() -> None:
    """Refuse to promise a page that could not be written.

    Raises:
        ImportError: naming what is missing.
    """
    missing = [name for name in ('jinja2', 'plotly') if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'a report needs {" and ".join(missing)}: pip install {" ".join(missing)}, or do '
            'without a report'
        )
