"""What the results of a study say: means, and paired differences with their intervals."""

import math
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy.stats import ttest_1samp

from .schedule import best_lr, final_runs, load_result, score
from .spec import Arm, Run, Study

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """An arm against the baseline, seed by seed.

    Attributes:
        values: the differences, by seed.
        low: lower end of the 95 % t-interval of their mean; NaN with fewer than two.
        high: upper end.
    """

    values: dict[int, float]
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The mean difference."""
        return fmean(self.values.values())

    @property
    def wins(self) -> int:
        """Seeds at which the arm is above the baseline."""
        return sum(value > 0 for value in self.values.values())


@dataclass(frozen=True)
class ArmSummary:
    """What is known of an arm.

    Attributes:
        arm: the arm.
        lr: its best, or fixed, learning rate; None as long as it is not tuned.
        tuning: the mean metric on the validation split by learning rate.
        scores: the metric on the test split by seed.
        seconds: mean processor time of a training; NaN where none has finished.
        results: of its final runs, by seed.
        problems: a sentence each: runs that diverged, failed or are missing.
    """

    arm: Arm
    lr: float | None
    tuning: dict[float, float]
    scores: dict[int, float]
    seconds: float
    results: dict[int, dict] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN where there is none."""
        return fmean(self.scores.values()) if self.scores else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; NaN with fewer than two."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else math.nan


def summarise(study: Study, arm: Arm) -> ArmSummary:
    """Read an arm's results."""
    tuning: dict[float, list[float]] = {}
    if arm.lr is None:
        for lr in study.lrs:
            values = [_value(study, arm, lr, seed, 'val') for seed in study.tune_seeds]
            if all(value is not None for value in values):
                tuning[lr] = fmean(values)
    results, scores, problems, missing = {}, {}, [], []
    for run in final_runs(study, arm):
        result = load_result(study, run)
        value = score(study, result, 'test')
        if value is not None:
            results[run.seed], scores[run.seed] = result, value
        elif result is None:
            missing.append(run.seed)
        elif result['status'] == 'ok':
            given = ', '.join(result['test'])
            problems.append(f'{run} has no {study.metric!r}; the evaluator gave {given}')
        else:
            problems.append(f'{run} {result["status"]}: {result["reason"]}')
    if missing and scores:
        problems.append(f'{arm.name}: seeds {", ".join(map(str, missing))} have not been run')
    lr = best_lr(study, arm)
    if arm.lr is None and 0 < len(tuning) < len(study.lrs):
        problems.append(
            f'{arm.name}: {len(tuning)} of {len(study.lrs)} learning rates have a result'
        )
    elif arm.lr is None and lr in (study.lrs[0], study.lrs[-1]):
        problems.append(f'{arm.name}: its best learning rate, {lr:g}, is at the edge of the grid')
    seconds = fmean(r['seconds'] for r in results.values()) if results else math.nan
    return ArmSummary(arm, lr, tuning, scores, seconds, results, tuple(problems))


def _value(study: Study, arm: Arm, lr: float, seed: int, split: str) -> float | None:
    return score(study, load_result(study, Run(arm, lr, seed)), split)


def difference(arm: ArmSummary, baseline: ArmSummary) -> Difference | None:
    """An arm against another over the seeds that both have; None where there is no such seed."""
    common = sorted(arm.scores.keys() & baseline.scores.keys())
    if not common:
        return None
    values = {seed: arm.scores[seed] - baseline.scores[seed] for seed in common}
    if len(common) < 2:
        return Difference(values, math.nan, math.nan)
    interval = ttest_1samp(list(values.values()), 0).confidence_interval(CONFIDENCE)
    return Difference(values, float(interval.low), float(interval.high))


def in_words(arm: ArmSummary, found: Difference | None, baseline: str) -> str:
    """What can be said of an arm against the baseline, in a sentence."""
    name = arm.arm.name
    if found is None:
        return f'{name}: no seed to compare with {baseline} yet.'
    count = len(found.values)
    if math.isnan(found.low):
        return f'{name}: {found.mean:+.2f} against {baseline}, one seed: not told from noise.'
    interval = f'95 % interval {found.low:+.2f} to {found.high:+.2f}, {count} seeds'
    if found.low > 0:
        return f'{name} is above {baseline} by {found.mean:.2f} ({interval}).'
    if found.high < 0:
        return f'{name} is below {baseline} by {-found.mean:.2f} ({interval}).'
    largest = max(abs(found.low), abs(found.high))
    return (
        f'{name}: no difference from {baseline} larger than {largest:.2f} was seen '
        f'({found.mean:+.2f}, {interval}).'
    )
