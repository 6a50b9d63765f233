"""Tables in Markdown."""

from collections.abc import Iterable


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown, without a newline at its end."""
    first = list(head)
    lines = [first, ['---'] * len(first), *rows]
    # A cell may contain what Markdown takes for a column or a link: a|b, [to=7](%1169).
    cells = [
        [str(cell).replace('|', '\\|').replace('](', '] (') for cell in line] for line in lines
    ]
    return '\n'.join(f'| {" | ".join(line)} |' for line in cells)
