"""The page of a study: which arm is better, and how sure that is."""

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
    """The HTML of a study's page, with all that it needs in it.

    Args:
        title: the name of the study.
        metric: what arms are compared by.
        baseline: the arm that the others are compared with.
        table: of the results, its head first.
        sentences: what can be said of the arms.
        problems: what is missing or failed.
        curves: by arm, of every seed the steps and values.
        differences: by arm, its differences by seed, and the ends of the interval of their mean.
        tuning: by arm, the metric by learning rate.
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
