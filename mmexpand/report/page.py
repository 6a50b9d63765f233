"""HTML pages without external files."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs


def render(template: str, **content: object) -> str:
    """Return a filled template with plotly's script inside."""
    pages = Environment(
        loader=PackageLoader('mmexpand.report'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(
        chart=_chart,
        number=_number,
        millions=lambda value: f'{value / 1e6:,.2f} M',
        css=lambda color: '#{:02x}{:02x}{:02x}'.format(*color),
    )
    return pages.get_template(template).render(plotly=Markup(get_plotlyjs()), **content)


def _chart(figure: Figure) -> Markup:
    options = dict(displayModeBar=False, responsive=True)
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=options))


def _number(value: float | None) -> str:
    """Return a metric as text: four digits of a share, two decimals of a percentage."""
    if value is None:
        return '-'
    return f'{value:.2f}' if abs(value) > 1 else f'{value:.4f}'
