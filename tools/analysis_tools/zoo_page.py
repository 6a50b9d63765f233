"""The page of zoo.py."""


def page(results: list[dict]) -> str:
    """The page of all results, as Markdown."""
    return str(results)
