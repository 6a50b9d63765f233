"""The charts of the pages, in plotly."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean

from plotly import graph_objects as go

from ..metrics import is_main
from .curves import Curve, Log, mean_and_deviation

COLORS = ('#2f6fde', '#e07b39', '#2e9e6b', '#b0449c', '#c9a227', '#4aa8c0', '#7a6ff0', '#8a5a44')
DASHES = ('dash', 'dot', 'dashdot')
POINTS = 1000
"""Points of a curve at most: more are invisible and make the page large."""
SYMBOLS = {'in the model': 'circle', 'on captured input': 'diamond', 'on random input': 'x'}


def loss_chart(log: Log) -> go.Figure | None:
    """Return a chart of the losses of a training; None if no loss was logged.

    Long curves show means of consecutive points.
    """
    if not log.losses:
        return None
    figure = _figure('iteration', 'loss', height=380)
    for index, (name, curve) in enumerate(log.losses.items()):
        steps, values = _thinned(curve)
        line = dict(color=_color(index), width=2.5 if name == 'loss' else 1.3)
        figure.add_scatter(x=steps, y=values, name=name, mode='lines', line=line)
    return figure


def metric_chart(log: Log, compact: Mapping[str, Mapping[str, float]]) -> go.Figure | None:
    """Return a chart of the metrics of all evaluations, and of the compact networks.

    Args:
        log: the log of the training.
        compact: metrics by weight set.
    """
    if not log.metrics:
        return None
    figure = _figure('iteration', 'metric (validation)', height=380)
    main = [name for name in log.metrics if is_main(name)] or list(log.metrics)[:1]
    for index, (name, (steps, values)) in enumerate(log.metrics.items()):
        shown = True if name in main else 'legendonly'
        line = dict(color=_color(index), width=2)
        label = f'{name}, expanded'
        style = dict(mode='lines+markers', line=line, marker_size=7, visible=shown)
        figure.add_scatter(x=steps, y=values, name=label, **style)
    steps = log.training.get('step', ([], []))[0] or log.evaluations['step'][0]
    for index, (weights, metrics) in enumerate(compact.items()):
        for name in (name for name in main if name in metrics):
            label = f'{name}, compact, {weights} weights'
            line = dict(
                color=_color(index + len(log.metrics)), width=2, dash=DASHES[index % len(DASHES)]
            )
            ends = [steps[0], steps[-1]]
            figure.add_scatter(x=ends, y=[metrics[name]] * 2, name=label, mode='lines', line=line)
    return figure


def error_chart(
    errors: Mapping[str, Mapping[str, tuple[float, str]]], tolerance: float
) -> go.Figure | None:
    """Return a chart of the errors of a verification by layer, for each weight set.

    Args:
        errors: errors by weight set and layer; 'end to end' is among the layers.
        tolerance: the largest error allowed.
    """
    if not errors:
        return None
    places = list(dict.fromkeys(place for one in errors.values() for place in one))
    found = [error for one in errors.values() for error, _ in one.values() if error > 0]
    # A logarithmic axis cannot show an error of 0.
    least = min(found, default=1e-16) / 3
    figure = _figure('largest relative error', '', height=130 + 26 * len(places))
    for index, (name, one) in enumerate(errors.items()):
        symbols = [SYMBOLS.get(how, 'square') for _, how in one.values()]
        figure.add_scatter(
            x=[max(error, least) for error, _ in one.values()],
            y=list(one),
            mode='markers',
            name=name,
            # Markers beneath show around it.
            marker=dict(color=_color(index), size=max(14 - 4 * index, 5), symbol=symbols),
            text=[f'{error:.2e}, {how}' for error, how in one.values()],
            hovertemplate='%{y}: %{text}<extra></extra>',
        )
    figure.add_vline(x=tolerance, line=dict(color='#c0392b', dash='dash'))
    ends = [math.log10(least) - 0.3, math.log10(tolerance) + 0.7]
    note = dict(yref='paper', y=1, yanchor='bottom', text='allowed', showarrow=False)
    figure.add_annotation(x=math.log10(tolerance), **note)
    figure.update_xaxes(type='log', range=ends, exponentformat='power', dtick=1)
    figure.update_yaxes(categoryorder='array', categoryarray=places[::-1], automargin=True)
    return figure


def band_chart(
    curves: Mapping[str, Iterable[Sequence[tuple[int, float]]]], metric: str
) -> go.Figure:
    """Return a chart of several seeds: their mean, and a standard deviation to both sides.

    Args:
        curves: steps and values of every seed, by name.
        metric: the label of the axis.
    """
    figure = _figure('iteration', f'{metric} (validation)', height=460)
    for index, (name, seeds) in enumerate(curves.items()):
        steps, means, spread = mean_and_deviation(chain.from_iterable(seeds))
        upper = [mean + width for mean, width in zip(means, spread, strict=True)]
        lower = [mean - width for mean, width in zip(means, spread, strict=True)]
        color = _color(index)
        figure.add_scatter(
            x=steps + steps[::-1],
            y=upper + lower[::-1],
            mode='lines',
            fill='toself',
            fillcolor=color,
            opacity=0.15,
            line_width=0,
            legendgroup=name,
            showlegend=False,
            hoverinfo='skip',
        )
        style = dict(mode='lines+markers', line=dict(color=color, width=2), legendgroup=name)
        figure.add_scatter(x=steps, y=means, name=name, **style)
    return figure


def interval_chart(
    differences: Mapping[str, tuple[Mapping[int, float], float, float]], label: str
) -> go.Figure:
    """Return a chart of the differences by seed, their mean and its interval.

    Args:
        differences: values by seed and the ends of the interval, by name.
        label: the label of the axis.
    """
    figure = _figure(label, '', height=130 + 46 * len(differences))
    for index, (name, (values, low, high)) in enumerate(differences.items()):
        mean, color = fmean(values.values()), _color(index + 1)
        figure.add_scatter(
            x=list(values.values()),
            y=[name] * len(values),
            mode='markers',
            marker=dict(color='#9aa4b2', size=8),
            text=[f'seed {seed}' for seed in values],
            hovertemplate='%{text}: %{x:.4g}<extra></extra>',
        )
        interval = (
            None if math.isnan(low) else dict(array=[high - mean], arrayminus=[mean - low], width=8)
        )
        figure.add_scatter(
            x=[mean],
            y=[name],
            mode='markers',
            marker=dict(color=color, size=12, symbol='diamond'),
            error_x=interval,
            hovertemplate=f'{name}: mean %{{x:.4g}}<extra></extra>',
        )
    figure.add_vline(x=0, line=dict(color='#1f2733', width=1))
    figure.update_yaxes(autorange='reversed', automargin=True)
    figure.update_layout(showlegend=False)
    return figure


def tuning_chart(tuning: Mapping[str, Mapping[float, float]], metric: str) -> go.Figure:
    """Return a chart of the metric by learning rate, for every arm."""
    figure = _figure('learning rate', f'{metric} (validation)', height=380)
    for index, (name, by_rate) in enumerate(tuning.items()):
        rates = sorted(by_rate)
        style = dict(mode='lines+markers', line_color=_color(index))
        figure.add_scatter(x=rates, y=[by_rate[rate] for rate in rates], name=name, **style)
    ticks = sorted({rate for by_rate in tuning.values() for rate in by_rate})
    figure.update_xaxes(type='log', tickvals=ticks, ticktext=[f'{rate:g}' for rate in ticks])
    return figure


def _thinned(curve: Curve) -> Curve:
    steps, values = curve
    size = -(-len(values) // POINTS)
    starts = range(0, len(values), size)
    # A mean is drawn at the last step that it covers.
    ends = [steps[min(start + size, len(steps)) - 1] for start in starts]
    return ends, [fmean(values[start : start + size]) for start in starts]


def _figure(x: str, y: str, height: int) -> go.Figure:
    return go.Figure(
        layout=dict(
            template='plotly_white',
            height=height,
            margin=dict(l=60, r=20, t=30, b=50),
            xaxis_title=x,
            yaxis_title=y,
            font=dict(family='system-ui, sans-serif', size=13, color='#1f2733'),
            legend=dict(orientation='h', y=1.02, yanchor='bottom', x=0),
            hovermode='closest',
        )
    )


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]
