"""The page of a study: differences between arms and their intervals."""

from collections.abc import Iterable, Mapping, Sequence

from .charts import band_chart, interval_chart, tuning_chart
from .page import render


def render_study(
    *,
    title: str,
    metric: str,
    baseline: str,
    table: Sequence[Sequence[str]],
    sentences: Sequence[str],
    problems: Sequence[str],
    curves: Mapping[str, Iterable[Sequence[tuple[int, float]]]],
    differences: Mapping[str, tuple[Mapping[int, float], float, float]],
    tuning: Mapping[str, Mapping[float, float]],
) -> str:
    """Return the page of a study as HTML without external files.

    Args:
        title: the name of the study.
        metric: the metric that arms are compared by.
        baseline: the arm that the others are compared with.
        table: rows of the results, the head first.
        sentences: findings.
        problems: missing and failed runs.
        curves: steps and values of every seed, by arm.
        differences: differences by seed and the ends of the interval of their mean, by arm.
        tuning: the metric by learning rate, by arm.
    """
    head, *rows = table
    label = f'{metric} (test) minus that of {baseline}'
    return render(
        'study.html',
        title=title,
        metric=metric,
        baseline=baseline,
        head=head,
        rows=rows,
        sentences=sentences,
        problems=problems,
        curves=band_chart(curves, metric) if curves else None,
        differences=interval_chart(differences, label) if differences else None,
        tuning=tuning_chart(tuning, metric) if tuning else None,
    )
