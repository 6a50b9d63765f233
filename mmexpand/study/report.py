"""A study's results as a table, sentences, one JSON, two pictures and a page."""

import math
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure

from ..files import save_figure, write_text
from ..markdown import markdown_table
from ..report import check_report
from ..report.curves import mean_and_deviation
from .run import write_json
from .spec import Study
from .statistics import (
    ArmSummary,
    Difference,
    decimals,
    difference,
    in_words,
    summarise,
    time_ratio,
)

HEAD = (
    *('arm', 'learning rate', 'seeds', 'mean', 'sd', 'difference', '95 % interval', 'above'),
    *('training time', 'validation mean'),
)


def write_report(study: Study, out_dir: str | os.PathLike) -> str:
    """Write ``study.json``, ``study.md``, two pictures, and ``study.html``.

    ``study.html`` is skipped if ``missing_for_page`` returns a reason.

    Args:
        study: the study; runs without a result are named, all others are reported.
        out_dir: the folder of these files.

    Returns:
        The Markdown: table and sentences.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    arms = [summarise(study, arm) for arm in study.arms.values()]
    baseline = next(arm for arm in arms if arm.arm.name == study.baseline)
    found = {a.arm.name: difference(a, baseline) for a in arms if a is not baseline}
    findings = _findings(study, arms, baseline, found)
    text = _markdown(findings)
    write_text(text, out_dir / 'study.md')
    # Arms have their own level: an arm may be called 'study'.
    content = {arm.arm.name: _arm_as_json(arm, found.get(arm.arm.name)) for arm in arms}
    head = dict(study=study.name, metric=study.metric, baseline=study.baseline)
    write_json(dict(head, arms=content), out_dir / 'study.json')
    _plot_curves(study, arms, out_dir / 'curves.png')
    _plot_differences(study, found, out_dir / 'differences.png')
    if not missing_for_page():
        _write_page(study, arms, found, findings, out_dir / 'study.html')
    return text


def missing_for_page() -> str:
    """Return the reason why ``study.html`` cannot be written, or ''."""
    try:
        check_report()
    except ImportError as error:
        return str(error)
    return ''


@dataclass(frozen=True)
class _Findings:
    """Content of both the Markdown and the page."""

    metric: str
    rows: list[tuple[str, ...]]
    sentences: list[str]
    problems: list[str]


def _findings(
    study: Study,
    arms: list[ArmSummary],
    baseline: ArmSummary,
    found: dict[str, Difference | None],
) -> _Findings:
    places = decimals(value for arm in arms for value in arm.scores.values())
    rows = [_row(arm, baseline, found.get(arm.arm.name), places) for arm in arms if arm.scores]
    sentences = [
        in_words(arm, found[arm.arm.name], baseline, places)
        for arm in arms
        if arm.scores and arm.arm.name in found
    ]
    problems = [problem + '.' for arm in arms for problem in arm.problems]
    problems += _not_timed(arms, baseline)
    untried = [arm.arm.name for arm in arms if not arm.scores]
    if untried:
        problems.append(f'No seed has been run to its end: {", ".join(untried)}.')
    return _Findings(study.metric, rows, sentences, problems)


def _not_timed(arms: list[ArmSummary], baseline: ArmSummary) -> list[str]:
    other = [
        arm.arm.name
        for arm in arms
        if math.isfinite(arm.seconds / baseline.seconds)
        and math.isnan(time_ratio(arm, baseline))
        and arm is not baseline
    ]
    if not other:
        return []
    return [
        'No training time is given of arms that were not trained at the same time as '
        f'{baseline.arm.name}: {", ".join(other)}; tools/analysis_tools/benchmark_training.py '
        'takes the time of both in turns.'
    ]


def _markdown(found: _Findings) -> str:
    table = markdown_table(HEAD, found.rows)
    parts = [f'{found.metric} on the test split, last weights.', table]
    blocks = (found.sentences, found.problems)
    parts += ['\n'.join(f'- {line}' for line in block) for block in blocks if block]
    return '\n\n'.join(parts) + '\n'


def _row(
    arm: ArmSummary, baseline: ArmSummary, found: Difference | None, places: int
) -> tuple[str, ...]:
    numbers = [
        arm.arm.name,
        f'{arm.lr:g}' + (' (fixed)' if arm.arm.lr is not None else ' (edge)' if arm.edge else ''),
        str(len(arm.scores)),
        _number(arm.mean, places),
        _number(arm.deviation, places),
    ]
    if found is None:
        numbers += ['', '', '']
    else:
        low, high = f'{found.low:+.{places}f}', f'{found.high:+.{places}f}'
        interval = '' if math.isnan(found.low) else f'{low} to {high}'
        count = f'{found.wins} of {len(found.values)}'
        numbers += [f'{found.mean:+.{places}f}', interval, count]
    return (*numbers, _number(time_ratio(arm, baseline), 2), _number(arm.validation, places))


def _number(value: float, places: int) -> str:
    return '' if math.isnan(value) else f'{value:.{places}f}'


def _arm_as_json(arm: ArmSummary, against: Difference | None) -> dict:
    interval = against and [_finite(against.low), _finite(against.high)]
    return dict(
        lr=arm.lr,
        edge=arm.edge,
        tuning={f'{lr:g}': value for lr, value in arm.tuning.items()},
        test=arm.scores,
        mean=_finite(arm.mean),
        deviation=_finite(arm.deviation),
        validation=_finite(arm.validation),
        seconds=_finite(arm.seconds),
        differences=against and against.values,
        interval=None if interval is None or None in interval else interval,
        problems=arm.problems,
    )


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plot_curves(study: Study, arms: list[ArmSummary], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for arm in (arm for arm in arms if arm.results):
        points = chain.from_iterable(map(_curve, arm.results.values()))
        steps, means, spread = mean_and_deviation(points)
        (line,) = axes.plot(steps, means, marker='.', label=arm.arm.name)
        low, high = ([m + sign * d for m, d in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel='iteration', ylabel=f'{study.metric} (validation)', title=study.name)
    if axes.lines:
        axes.legend(fontsize='small')
    save_figure(figure, path)


def _curve(result: dict) -> list[tuple[int, float]]:
    # mmdet's evaluators give nothing before the first detection.
    return [(step, value) for step, value in result['curve'] if value is not None]


def _plot_differences(study: Study, found: dict[str, Difference | None], path: Path) -> None:
    shown = {name: d for name, d in reversed(found.items()) if d is not None}
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(shown)), layout='constrained')
    axes = figure.subplots()
    for place, one in enumerate(shown.values()):
        values = list(one.values.values())
        axes.plot(values, [place] * len(values), 'o', color='0.6', markersize=4)
        if not math.isnan(one.low):
            axes.plot([one.low, one.high], [place, place], color='tab:blue', linewidth=2)
        axes.plot(one.mean, place, 'D', color='tab:blue')
    axes.axvline(0, color='black', linewidth=0.8)
    axes.set_yticks(range(len(shown)), list(shown))
    label = f'{study.metric} (test) minus that of {study.baseline}, seed by seed; mean, 95 %'
    axes.set(xlabel=label, title=study.name)
    save_figure(figure, path)


def _write_page(
    study: Study,
    arms: list[ArmSummary],
    found: dict[str, Difference | None],
    findings: _Findings,
    path: Path,
) -> None:
    # This module imports optional packages.
    from ..report.study import render_study

    results = {arm.arm.name: arm.results.values() for arm in arms if arm.results}
    curves = {name: [_curve(result) for result in runs] for name, runs in results.items()}
    differences = {name: (d.values, d.low, d.high) for name, d in found.items() if d is not None}
    html = render_study(
        title=study.name,
        metric=study.metric,
        baseline=study.baseline,
        table=[HEAD, *findings.rows],
        sentences=findings.sentences,
        problems=findings.problems,
        curves=curves,
        differences=differences,
        tuning={arm.arm.name: arm.tuning for arm in arms if arm.tuning},
    )
    write_text(html, path)
