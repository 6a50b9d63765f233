"""Runs of a config, for tests of the framework layer."""

import re
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from mmexpand.mm.start import StartHook
from mmexpand.surgery.checkpoint import load_checkpoint

ENCODER = ('0.0.convs.0', '1.1.convs.0', '1.1.convs.1')
UNITS = [f'backbone.encoder.{name}.conv' for name in ENCODER]
"""The layers of conftest's network that ``hooks`` expands."""
EMA = dict(type='EMAHook', momentum=0.1)


def hooks(*more: dict, **expand: object) -> list[dict]:
    """Return the configs of the two hooks, with more hooks between them."""
    expand = dict(dict(include='backbone.encoder', method='cl', rate=2), **expand)
    return [dict(type='ExpandHook', **expand), *more, dict(type='ContractHook')]


def weights(path: str | Path) -> dict:
    """Return the state dict of a checkpoint."""
    return load_checkpoint(path)['state_dict']


def train(cfg: Config) -> Runner:
    """Train as a config says."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def log_of(cfg: Config) -> str:
    """Return the log of a finished run."""
    return next(Path(cfg.work_dir).glob('*/*.log')).read_text()


def words_of(runner: Runner) -> str | None:
    """Return what a finished run has logged on its start."""
    return next(hook.words for hook in runner.hooks if isinstance(hook, StartHook))


def distances(words: str) -> list[float]:
    """Return the distances to the given network, in eval and in training mode."""
    return [float(value) for value in re.findall(r'([\d.]+e[+-]\d+) in', words)]


@MODELS.register_module()
class NormEval(EncoderDecoder):
    """A segmentor that keeps its norms in eval mode, as mmdet's ResNet does by default."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self
