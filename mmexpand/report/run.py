"""The page of a run: expanded layers, contraction, metrics and predictions."""

from dataclasses import dataclass, field

from ..metrics import is_main
from .charts import error_chart, loss_chart, metric_chart
from .curves import Log
from .gallery import Gallery
from .page import render


@dataclass(frozen=True)
class LayerRow:
    """An expanded layer and its cost.

    Attributes:
        name: its name in the model.
        block: the block of its unit.
        factors: shapes of the factors.
        params_before: parameters of the layer.
        params_after: parameters of its factors.
        macs: operations for one image: compact, layer by layer, and in the cheaper of both orders;
            None if the forward pass does not reach it, or no image exists.
    """

    name: str
    block: str
    factors: list[str]
    params_before: int
    params_after: int
    macs: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Cost:
    """The expanded layers and their cost.

    Attributes:
        layers: the expanded layers.
        skipped: names of the skipped layers by reason.
        params_compact: parameters of the whole network.
        params_expanded: parameters of the expanded network.
        macs: operations of the whole network for one image, as in ``LayerRow``; None if the
            forward pass ends before the heads, or no image exists.
        image: height and width of that image.
    """

    layers: list[LayerRow]
    skipped: dict[str, list[str]]
    params_compact: int
    params_expanded: int
    macs: tuple[int, int, int] | None = None
    image: tuple[int, int] | None = None


@dataclass(frozen=True)
class WeightSet:
    """A compact checkpoint.

    Attributes:
        name: 'last', 'best', 'ema', ...
        file: the name of its file.
        megabytes: the size of its file.
        tolerance: the largest relative error that was allowed.
        found: results of the contraction, from the checkpoint's meta.
    """

    name: str
    file: str
    megabytes: float
    tolerance: float
    found: dict

    @property
    def errors(self) -> dict[str, tuple[float, str]]:
        """Return the errors end to end and by layer, each with the way it was found."""
        found = self.found
        layers = {
            name: (e, found['verified_on'][name]) for name, e in found['layer_errors'].items()
        }
        return {'end to end': (found['output_error'], found['compared']), **layers}

    @property
    def metrics(self) -> dict[str, tuple[float, float | None]]:
        """Return the metrics of the compact network, and of the expanded one if evaluated."""
        expanded = self.found.get('metrics_expanded') or {}
        return {
            name: (value, expanded.get(name))
            for name, value in self.found.get('metrics_compact', {}).items()
            if isinstance(value, (int, float))
        }


@dataclass
class RunReport:
    """The content of the page of a run.

    Attributes:
        title: the name of the run.
        about: facts about the run, each in a few words.
        notes: sentences on parts that are missing in the report, with the reason.
        cost: the expanded layers; None if unknown.
        sets: the compact checkpoints.
        log: the logged scalars.
        gallery: predictions; None if none were made.
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
        """Return the best weights if they were kept, else the last ones."""
        names = [one.name for one in self.sets]
        best = [name for name in names if name.startswith('best')]
        chosen = next(iter([*sorted(best), *({'last'} & {*names}), *names]), None)
        return next((one for one in self.sets if one.name == chosen), None)


def render_run(report: RunReport) -> str:
    """Return the page of a run as HTML without external files."""
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
