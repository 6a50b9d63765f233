"""The page of a run: what was expanded, how it was contracted, and what came out."""

from dataclasses import dataclass, field

from .charts import error_chart, loss_chart, metric_chart
from .curves import Log, is_main
from .gallery import Gallery
from .page import render


@dataclass(frozen=True)
class LayerRow:
    """An expanded layer and its cost.

    Attributes:
        name: in the model.
        block: what it is expanded into.
        rate: the expansion rate.
        factors: their shapes.
        params_before: parameters of the layer.
        params_after: of its factors.
        macs: of one image: compact, factor by factor, and in the cheapest order; None where the
            forward pass does not reach it, or there is no image.
    """

    name: str
    block: str
    rate: float
    factors: list[str]
    params_before: int
    params_after: int
    macs: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Cost:
    """What was expanded and what it costs.

    Attributes:
        layers: the expanded ones.
        left_out: names of the others by the reason.
        params_compact: parameters of the whole network.
        params_expanded: while it is trained.
        macs: of the whole network and one image, as in ``LayerRow``; None where the forward pass
            ends before the heads, or there is no image.
        image: height and width of that image.
    """

    layers: list[LayerRow]
    left_out: dict[str, list[str]]
    params_compact: int
    params_expanded: int
    macs: tuple[int, int, int] | None = None
    image: tuple[int, int] | None = None


@dataclass(frozen=True)
class WeightSet:
    """A compact checkpoint.

    Attributes:
        name: 'last', 'best', 'ema', ...
        file: its name.
        megabytes: its size.
        tolerance: the largest relative error that was allowed.
        found: what the contraction has found out, as in the checkpoint's meta.
    """

    name: str
    file: str
    megabytes: float
    tolerance: float
    found: dict

    @property
    def errors(self) -> dict[str, tuple[float, str]]:
        """The errors end to end and by layer, each with how it was found."""
        found = self.found
        layers = {
            name: (e, found['verified_on'][name]) for name, e in found['layer_errors'].items()
        }
        return {'end to end': (found['output_error'], found['compared']), **layers}

    @property
    def metrics(self) -> dict[str, tuple[float, float | None]]:
        """Each metric of the compact network, and of the expanded one where it was evaluated."""
        expanded = self.found.get('metrics_expanded') or {}
        return {
            name: (value, expanded.get(name))
            for name, value in self.found.get('metrics_compact', {}).items()
            if isinstance(value, (int, float))
        }


@dataclass
class RunReport:
    """What the page of a run shows.

    Attributes:
        title: the name of the run.
        about: facts about it, each in a few words.
        notes: sentences: what is missing in the report, and why.
        cost: what was expanded; None if that is not known.
        sets: the compact checkpoints.
        log: what was logged.
        gallery: predictions; None if there are none.
    """

    title: str
    about: list[str]
    notes: list[str]
    cost: Cost | None = None
    sets: list[WeightSet] = field(default_factory=list)
    log: Log = field(default_factory=Log)
    gallery: Gallery | None = None

    @property
    def chosen(self) -> WeightSet | None:
        """The weights that count: the best ones, where they were kept."""
        best = [one for one in self.sets if one.name == 'best']
        return next(iter(best + self.sets), None)


def render_run(report: RunReport) -> str:
    """The HTML of a run's page, with all that it needs in it."""
    compact = {s.name: {name: pair[0] for name, pair in s.metrics.items()} for s in report.sets}
    tolerance = max((s.tolerance for s in report.sets), default=0)
    metrics = list(dict.fromkeys(name for s in report.sets for name in s.metrics))
    return render(
        'run.html',
        report=report,
        metrics=sorted(metrics, key=lambda name: not is_main(name)),
        best=report.chosen,
        all_compared=all('metrics_expanded' in s.found for s in report.sets),
        losses=loss_chart(report.log),
        curves=metric_chart(report.log, compact),
        errors=error_chart({s.file: s.errors for s in report.sets}, tolerance),
    )
