"""The metric by which networks are compared."""

from collections.abc import Mapping

from .errors import UserValueError


def is_main(metric: str) -> bool:
    """Return whether networks are compared by a metric."""
    return metric.endswith(('mAP', 'mIoU', 'accuracy', 'accuracy/top1'))


def best_metric(cfg: Mapping) -> str | None:
    """Return the metric that the checkpoint hook's ``save_best`` names first; None: no name.

    Raises:
        ValueError: if a smaller value of this metric is better.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    names, rules = (
        [value] if isinstance(value, str) else value or []
        for value in (hook.get('save_best'), hook.get('rule'))
    )
    for index, name in enumerate(names):
        if name == 'auto':
            continue
        # mmengine's rule for a loss, if none is given.
        rule = rules[min(index, len(rules) - 1)] if rules else 'less' if 'loss' in name else None
        if rule == 'less':
            raise UserValueError(
                f'networks are compared by a metric whose larger values are better, but '
                f"default_hooks.checkpoint has rule='less' for {name}; name another metric in "
                'save_best, or with --metric in a study'
            )
        return name
    return None
