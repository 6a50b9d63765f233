"""One run of a study: an ordinary Runner in a process of its own, and a result file."""

import argparse
import json
import math
import os
import time
import traceback
from pathlib import Path

import mmengine
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..mm.launch import build_runner
from ..version import __version__
from .spec import Run, Study, load_study

LOSS_POINTS = 50
"""Points of a loss curve in a result file."""


class Diverged(RuntimeError):
    """The loss is not finite."""


class RecordHook(Hook):
    """Keeps what a result file tells of the training; in the message hub, so that it resumes."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.record = dict(loss=[], val=[], seconds=0.0)

    def before_train(self, runner: Runner) -> None:
        """Go on with the record of a checkpoint that is resumed."""
        self.record = runner.message_hub.runtime_info.get('study', self.record)
        self._every = max(1, runner.max_iters // LOSS_POINTS)
        self._sum = 0.0

    def before_train_iter(self, *_: object, **__: object) -> None:
        """Look at the clock."""
        self._start = time.process_time()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Add up time and loss.

        Raises:
            Diverged: where the loss is not finite.
        """
        self.record['seconds'] += time.process_time() - self._start
        loss = float(outputs['loss'])
        if not math.isfinite(loss):
            raise Diverged(f'the loss is {loss} at iteration {runner.iter + 1}')
        self._sum += loss
        if (runner.iter + 1) % self._every == 0:
            self.record['loss'].append([runner.iter + 1, round(self._sum / self._every, 5)])
            self._sum = 0.0
        runner.message_hub.update_info('study', self.record)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Note a validation at its own step."""
        self.record['val'].append([runner.iter, numbers(metrics)])


def numbers(metrics: dict) -> dict[str, float]:
    """What an evaluator gives, as numbers that JSON holds."""
    return {key: round(float(value), 5) for key, value in metrics.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def run_config(study: Study, run: Run) -> Config:
    """The config of a run: the arm's, with its learning rate, seed and work dir."""
    cfg = Config.fromfile(run.arm.config)
    cfg.merge_from_dict(run.arm.cfg_options)
    cfg.optim_wrapper.optimizer.lr = run.lr
    cfg.randomness = dict(seed=run.seed)
    cfg.work_dir = str(study.work_dir / run.arm.name / run.name)
    cfg.experiment_name = f'{study.name}_{run.arm.name}_{run.name}'
    cfg.resume = (Path(cfg.work_dir) / 'last_checkpoint').is_file()
    return cfg


def train(study: Study, run: Run) -> dict:
    """Train, and evaluate the last weights (EMAHook's, where it is on) on both splits.

    Returns:
        The result, as it is written.
    """
    torch.set_num_threads(study.threads)
    # Numbers below the normal range are ten times slower to compute with, and nothing to learn.
    torch.set_flush_denormal(True)
    runner = build_runner(run_config(study, run), ('train', 'val', 'test'))
    if study.channels_last:
        runner.model.to(memory_format=torch.channels_last)
    hook = RecordHook()
    runner.register_hook(hook)
    result = dict(study=study.name, arm=run.arm.name, lr=run.lr, seed=run.seed)
    try:
        runner.train()
    except Diverged as error:
        return dict(result, status='diverged', reason=str(error), loss=hook.record['loss'])
    curve = hook.record['val']
    # The last validation is the one behind the last step.
    val = curve[-1][1] if curve and curve[-1][0] == runner.iter else None
    val = numbers(runner.val_loop.run()) if val is None else val
    return dict(
        result,
        status='ok',
        val=val,
        test=numbers(runner.test()),
        curve=[[step, metrics.get(study.metric)] for step, metrics in curve],
        loss=hook.record['loss'],
        seconds=round(hook.record['seconds'], 2),
        steps=runner.iter,
        parameters=sum(p.numel() for p in runner.model.parameters()),
        versions=dict(torch=torch.__version__, mmengine=mmengine.__version__, mmexpand=__version__),
    )


def write_json(content: object, path: Path) -> None:
    """Write JSON whole or not at all; lists of numbers stay on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    if isinstance(content, dict):
        lines = [f'  {json.dumps(key)}: {json.dumps(value)}' for key, value in content.items()]
        text = '{\n' + ',\n'.join(lines) + '\n}\n'
    else:
        text = json.dumps(content, indent=1) + '\n'
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    """``python -m mmexpand.study.run STUDY.py ARM LR SEED``."""
    parser = argparse.ArgumentParser(description='One run of a study')
    parser.add_argument('study')
    parser.add_argument('arm')
    parser.add_argument('lr', type=float)
    parser.add_argument('seed', type=int)
    args = parser.parse_args()
    study = load_study(args.study)
    run = Run(study.arm(args.arm), args.lr, args.seed)
    try:
        result = train(study, run)
    except Exception as error:
        traceback.print_exc()
        reason = f'{type(error).__name__}: {error}'
        base = dict(study=study.name, arm=run.arm.name, lr=run.lr, seed=run.seed)
        result = dict(base, status='failed', reason=reason)
    write_json(result, study.result_path(run))


if __name__ == '__main__':
    main()
