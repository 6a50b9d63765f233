"""Choice of each arm's learning rate: the rates to try, and the best rate tried.

With ``lrs='auto'`` the search starts at the rate of the arm's config, and goes up and down by
factors of 2 until rates on both sides of the best one were tried and are worse, or diverged. Its
state is in the result files alone: a stopped study continues, and results of an earlier grid are
part of the search.
"""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from .results import is_final, load_result, read_result, score
from .run import config_rate
from .spec import Arm, Run, Study

FACTOR = 2.0
"""Factor between neighbouring rates of a search."""

REACH = FACTOR**10
"""Largest factor between the config's rate and a rate of a search."""

ROUNDING = 1.001
"""Rates closer than this factor are equal: a search may meet rates of an earlier grid."""


def tried_rates(study: Study, arm: Arm) -> tuple[float, ...]:
    """Return the rates that an arm is tuned on, in order.

    These are the study's grid; with ``lrs='auto'`` the rates that have a result file.
    """
    if study.lrs is not None:
        return study.lrs
    rates = set()
    for seed in study.tune_seeds:
        for path in (study.results_dir / arm.name).glob(f'lr*_seed{seed}.json'):
            # The file name has only six digits of the rate.
            if result := read_result(path):
                rates.add(result['lr'])
    return tuple(sorted(rates))


def tuning_runs(study: Study, arm: Arm) -> list[Run]:
    """Return the runs that an arm's rate is chosen by; none if the rate is fixed."""
    if arm.lr is not None:
        return []
    return [Run(arm, lr, seed) for seed in study.tune_seeds for lr in tried_rates(study, arm)]


def tuned(study: Study, arm: Arm) -> dict[float, float | None]:
    """Return the mean metric on the validation split by rate, for rates that need no more runs.

    The mean is None if a run diverged or gave no metric.
    """
    means = {}
    for lr in tried_rates(study, arm):
        results = [load_result(study, Run(arm, lr, seed)) for seed in study.tune_seeds]
        if all(map(is_final, results)):
            values = [score(study, result, 'val') for result in results]
            means[lr] = None if None in values else fmean(values)
    return means


def best_lr(study: Study, arm: Arm) -> float | None:
    """Return the rate with the best mean on the validation split; None before any result.

    Of several equal rates it is the middle one, so that a search ends on a plateau.
    """
    if arm.lr is not None:
        return float(arm.lr)
    return _best(tuned(study, arm))


def _best(means: dict[float, float | None]) -> float | None:
    scores = {lr: mean for lr, mean in means.items() if mean is not None}
    if not scores:
        return None
    equal = [lr for lr, mean in scores.items() if mean == max(scores.values())]
    return equal[len(equal) // 2]


def at_edge(study: Study, arm: Arm) -> bool:
    """Return whether the arm's best rate is the smallest or the largest rate tried.

    False if the rate is fixed or no rate has been tried.
    """
    means = {} if arm.lr is not None else tuned(study, arm)
    best = _best(means)
    return best is not None and best in (min(means), max(means))


def rates_to_try(study: Study, arm: Arm, start: float) -> list[float]:
    """Return the next rates of a search from the rate ``start`` on, in order; none at its end."""
    means = tuned(study, arm)
    best = _best(means)
    if best is not None:
        wanted = [best / FACTOR, best * FACTOR]
        wanted = [lr for lr in wanted if not any(_between(lr, best, other) for other in means)]
    elif means:
        lowest = [load_result(study, Run(arm, min(means), seed)) for seed in study.tune_seeds]
        # Other metrics, but not this one: no rate gives it.
        if any(result.get('val') and study.metric not in result['val'] for result in lowest):
            return []
        # All diverged, or the lowest rate was too low for any metric, as without a detection.
        trained = all(result['status'] == 'ok' for result in lowest)
        wanted = [max(means) * FACTOR if trained else min(means) / FACTOR]
    else:
        wanted = [start]
    return [lr for lr in wanted if start / REACH / ROUNDING < lr < start * REACH * ROUNDING]


def _between(lr: float, best: float, other: float) -> bool:
    """Return whether another rate is as close to the best as ``lr``, on the same side."""
    low, high = sorted((lr, best))
    return other != best and low / ROUNDING < other < high * ROUNDING


def tuning_rounds(study: Study, arms: Sequence[Arm]) -> Iterator[list[Run]]:
    """Yield the tuning runs to do, in groups of runs that do not depend on each other's results.

    A failed run is tried once: the search of its arm continues with the next call of the tool.
    """
    tried: set[str] = set()
    starts = {}
    if study.lrs is None:
        starts = {arm.name: config_rate(arm) for arm in arms if arm.lr is None}
    while True:
        runs = [run for arm in arms for run in tuning_runs(study, arm)]
        for arm in arms:
            if arm.name in starts:
                rates = rates_to_try(study, arm, starts[arm.name])
                runs += [Run(arm, lr, seed) for seed in study.tune_seeds for lr in rates]
        wanted = {str(run): run for run in unfinished(study, runs) if str(run) not in tried}
        if not wanted:
            return
        tried.update(wanted)
        yield list(wanted.values())


def final_runs(study: Study, arm: Arm, seeds: Sequence[int] | None = None) -> list[Run]:
    """Return the runs that are reported: all seeds at the arm's best rate."""
    lr = best_lr(study, arm)
    return [] if lr is None else [Run(arm, lr, s) for s in arm.seeds if not seeds or s in seeds]


def unfinished(study: Study, runs: Iterable[Run]) -> list[Run]:
    """Return the runs that have no result yet, or failed."""
    return [run for run in runs if not is_final(load_result(study, run))]
