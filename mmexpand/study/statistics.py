"""Statistics of the results of a study: means, and paired differences with intervals."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy.stats import ttest_1samp

from .rates import at_edge, best_lr, final_runs, tried_rates, tuned, tuning_runs
from .results import load_result, result_problem, score
from .spec import Arm, Run, Study

CONFIDENCE = 0.95

SAME_TIME = 1.5
"""Largest ratio of the longest to the shortest training for which a mean time is given."""

Results = list[tuple[Run, dict | None]]
"""Runs with their results; None for a run without a result."""


@dataclass(frozen=True)
class Difference:
    """Differences of an arm from the baseline, seed by seed.

    Attributes:
        values: the differences, by seed.
        low: lower end of the 95 % t-interval of their mean; NaN with fewer than two.
        high: upper end of the interval.
    """

    values: dict[int, float]
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Return the mean difference."""
        return fmean(self.values.values())

    @property
    def wins(self) -> int:
        """Return the number of seeds at which the arm is above the baseline."""
        return sum(value > 0 for value in self.values.values())


@dataclass(frozen=True)
class ArmSummary:
    """The results of an arm.

    Attributes:
        arm: the arm.
        lr: its best or fixed learning rate; None before tuning.
        edge: whether this rate is the smallest or the largest rate tried.
        tuning: the mean metric on the validation split by learning rate.
        scores: the metric on the test split by seed.
        validation: its mean on the validation split over these seeds; NaN without a seed.
        seconds: mean time of a training's iterations, without loading their data (see
            ``run.clock``); NaN if no training has finished, or the load of the machine changed.
        period: start of its first training and end of its last one, in seconds; None if unknown.
        results: results of its final runs, by seed.
        problems: a sentence for each run that diverged, failed or is missing.
    """

    arm: Arm
    lr: float | None
    edge: bool
    tuning: dict[float, float]
    scores: dict[int, float]
    validation: float
    seconds: float
    period: tuple[float, float] | None = None
    results: dict[int, dict] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Return the mean over seeds; NaN without a seed."""
        return fmean(self.scores.values()) if self.scores else math.nan

    @property
    def deviation(self) -> float:
        """Return the standard deviation over seeds; NaN with fewer than two."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else math.nan


def summarise(study: Study, arm: Arm) -> ArmSummary:
    """Return a summary of an arm's result files."""
    lr, edge = best_lr(study, arm), at_edge(study, arm)
    tuning = [(run, load_result(study, run)) for run in tuning_runs(study, arm)]
    finals = [(run, load_result(study, run)) for run in final_runs(study, arm)]
    results = {run.seed: r for run, r in finals if score(study, r, 'test') is not None}
    scores = {seed: score(study, result, 'test') for seed, result in results.items()}
    validations = [score(study, result, 'val') for result in results.values()]
    validation = fmean(validations) if validations and None not in validations else math.nan
    # None if runs shared a GPU step by step.
    times = [result['seconds'] for result in results.values() if result['seconds'] is not None]
    problems = [
        *_tuning_problems(study, arm, tuning),
        *_run_problems(study, tuning, 'val'),
        *_run_problems(study, finals, 'test'),
        *_config_problems(arm, [*tuning, *finals]),
    ]
    if edge:
        said = 'is at the edge of those tried'
        problems.append(f'{arm.name}: its best learning rate, {lr:g}, {said}')
    if times and not _comparable(times):
        problems.append(
            f'{arm.name}: its trainings took {min(times):.0f} to {max(times):.0f} s, since the '
            'load of the machine changed: no training time is reported'
        )
    if tuning and any(result.get('test_is_val') for result in results.values()):
        problems.append(
            f'{arm.name}: its learning rate is chosen by the images that it is reported on, since '
            'test_dataloader has the dataset of val_dataloader: give it another in cfg_options'
        )
    missing = ', '.join(str(run.seed) for run, result in finals if result is None)
    if missing and scores:
        problems.append(f'{arm.name}: seeds {missing} have not been run')
    # A run that both tunes and is reported is named once.
    problems = tuple(dict.fromkeys(problems))
    seconds = fmean(times) if _comparable(times) else math.nan
    period = _period(results.values())
    means = {lr: mean for lr, mean in tuned(study, arm).items() if mean is not None}
    return ArmSummary(arm, lr, edge, means, scores, validation, seconds, period, results, problems)


def _period(results: Iterable[dict]) -> tuple[float, float] | None:
    periods = [result.get('period') for result in results]
    if not periods or None in periods:
        return None
    return min(start for start, _ in periods), max(end for _, end in periods)


def time_ratio(arm: ArmSummary, baseline: ArmSummary) -> float:
    """Return an arm's training time as a multiple of the baseline's; NaN if not simultaneous.

    The speed of a machine changes with its load.
    """
    if arm.period is None or baseline.period is None:
        return math.nan
    if arm.period[0] > baseline.period[1] or baseline.period[0] > arm.period[1]:
        return math.nan
    return arm.seconds / baseline.seconds


def _comparable(times: list[float]) -> bool:
    return bool(times) and max(times) <= SAME_TIME * min(times)


def _run_problems(study: Study, runs: Results, split: str) -> Iterator[str]:
    for run, result in runs:
        if result is not None and (problem := result_problem(study, result, split)):
            yield f'{run}: {problem}'


def _config_problems(arm: Arm, runs: Results) -> Iterator[str]:
    by_config: dict[str, list[str]] = {}
    # A run that both tunes and is reported counts once.
    for name, result in {run.name: result for run, result in runs}.items():
        if result is not None and 'config' in result:  # Older results have none.
            by_config.setdefault(result['config'], []).append(name)
    if len(by_config) > 1:
        groups = ' and '.join(', '.join(names) for names in by_config.values())
        yield (
            f'{arm.name}: its config was changed between {groups}: remove the results of the '
            'former config to run them again'
        )


def _tuning_problems(study: Study, arm: Arm, tuning: Results) -> Iterator[str]:
    missing = sorted({run.lr for run, result in tuning if result is None})
    if missing and len(missing) < len(tried_rates(study, arm)):
        yield f'{arm.name}: not tuned yet at learning rates {", ".join(f"{v:g}" for v in missing)}'


def difference(arm: ArmSummary, baseline: ArmSummary) -> Difference | None:
    """Return the difference of two arms over their common seeds; None without such a seed."""
    common = sorted(arm.scores.keys() & baseline.scores.keys())
    if not common:
        return None
    values = {seed: arm.scores[seed] - baseline.scores[seed] for seed in common}
    if len(common) < 2:
        return Difference(values, math.nan, math.nan)
    interval = ttest_1samp(list(values.values()), 0).confidence_interval(CONFIDENCE)
    return Difference(values, float(interval.low), float(interval.high))


def decimals(scores: Iterable[float]) -> int:
    """Return the number of decimals of scores: 2 for percentages, 4 for shares."""
    return 2 if max(map(abs, scores), default=0) > 1 else 4


def in_words(
    arm: ArmSummary, found: Difference | None, baseline: ArmSummary, places: int = 2
) -> str:
    """Return the finding on an arm against the baseline, in a sentence.

    Args:
        arm: the arm.
        found: its difference; None without a common seed.
        baseline: the baseline. If its best learning rate is at the edge of the rates tried, no
            difference is called a gain, since the next rate may be better.
        places: decimals of the numbers.
    """
    name, other = arm.arm.name, baseline.arm.name
    if found is None:
        return f'{name}: no seed to compare with {other} yet.'
    mean = f'{found.mean:+.{places}f}'
    if math.isnan(found.low):
        return f'{name}: {mean} against {other}, one seed, no interval.'
    low, high = f'{found.low:+.{places}f}', f'{found.high:+.{places}f}'
    interval = f'95 % interval {low} to {high}, {len(found.values)} seeds'
    if found.low > 0 and baseline.edge:
        return (
            f'{name}: {mean} against {other} ({interval}); no gain, as long as the best learning '
            f'rate of {other}, {baseline.lr:g}, is at the edge of those tried: try more.'
        )
    if found.low > 0:
        return f'{name} is above {other} by {mean[1:]} ({interval}).'
    if found.high < 0:
        return f'{name} is below {other} by {mean[1:]} ({interval}).'
    largest = f'{max(abs(found.low), abs(found.high)):.{places}f}'
    return (
        f'{name}: no difference from {other} larger than {largest} was seen ({mean}, {interval}).'
    )
