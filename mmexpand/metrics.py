"""The metric by which networks are compared."""

from collections.abc import Mapping


def is_main(metric: str) -> bool:
    """Return whether networks are compared by a metric."""
    return metric.endswith(('mAP', 'mIoU', 'accuracy', 'accuracy/top1'))


def best_metric(cfg: Mapping) -> str | None:
    """Return the metric that the checkpoint hook's ``save_best`` names first; None: no name."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    best = hook.get('save_best')
    names = [best] if isinstance(best, str) else best or []
    return next((name for name in names if name != 'auto'), None)
