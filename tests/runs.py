"""What tests of the framework layer do with a config."""

from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner


def train(cfg: Config) -> Runner:
    """Train as a config says."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def log_of(cfg: Config) -> str:
    """Return the log of a finished run."""
    return next(Path(cfg.work_dir).glob('*/*.log')).read_text()
