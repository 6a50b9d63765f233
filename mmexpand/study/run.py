"""One run of a study: an ordinary Runner in a separate process, and a result file."""

import argparse
import json
import math
import time
import traceback
from hashlib import sha256
from pathlib import Path

import mmengine
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from ..files import write_text
from ..mm.compact_config import dicts, type_name
from ..mm.config_file import open_config
from ..mm.datasets import check_datasets
from ..mm.launch import build_runner
from ..mm.logs import log
from ..mm.lost_hooks import warn_of_lost_hooks
from ..mm.models import build_expanded_model, configured_expansions
from ..mm.resume import is_whole
from ..version import __version__
from .results import is_final, load_result
from .spec import Arm, Run, Study, StudyError, load_study

CONFIG_NAME = 'config.json'
"""File in a run's folder with the config of the training."""

VALIDATIONS_NAME = 'validations.json'
"""File in a run's folder with its validations so far."""

LOCK_NAME = 'lock'
"""File in a run's folder that its process locks."""

LOSS_POINTS = 50
"""Number of points of a loss curve in a result file."""


class Diverged(RuntimeError):
    """A loss that is not finite."""


def clock() -> float:
    """Return processor seconds of all threads, without other processes; wall seconds with a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


class RecordHook(Hook):
    """Hook that records loss, time and validations, and restores the record on resuming."""

    # Before CheckpointHook, so that a checkpoint holds the record of its step.
    priority = 'LOW'

    def __init__(self):
        self.record = dict(loss=[], val=[], seconds=0.0, sum=0.0)

    def before_train(self, runner: Runner) -> None:
        """Restore the record of a resumed checkpoint."""
        if runner.iter:
            self.record.update(runner.message_hub.runtime_info.get('study', {}))
        # A checkpoint is written before the validation at its step, so validations have a file.
        self._path = Path(runner.work_dir) / VALIDATIONS_NAME
        if self._path.is_file():
            points = json.loads(self._path.read_text())
            self.record['val'] = [point for point in points if point[0] <= runner.iter]
        self._every = max(1, runner.max_iters // LOSS_POINTS)

    def before_train_iter(self, *_: object, **__: object) -> None:
        """Read the clock."""
        self._start = clock()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Add up time and loss.

        Raises:
            Diverged: if the loss is not finite.
        """
        record, step = self.record, runner.iter + 1
        loss = outputs['loss'].item()  # Waits for the GPU.
        record['seconds'] += clock() - self._start
        if not math.isfinite(loss):
            raise Diverged(f'the loss is {loss} at iteration {step}')
        record['sum'] += loss
        if step % self._every == 0:
            record['loss'].append([step, round(record['sum'] / self._every, 5)])
            record['sum'] = 0.0
        runner.message_hub.update_info('study', record)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Record a validation at its step."""
        self.record['val'].append([runner.iter, numbers(metrics)])
        write_json(self.record['val'], self._path)


def numbers(metrics: dict) -> dict[str, float]:
    """Return the finite numbers among metrics, rounded for JSON."""
    return {key: round(float(value), 5) for key, value in metrics.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def arm_config(arm: Arm) -> Config:
    """Return an arm's config before a run sets its learning rate.

    Raises:
        ConfigError: if no such config exists, or the arm's ``cfg_options`` do not fit it.
        StudyError: if the config has no learning rate, or a scheduler that replaces it.
    """
    cfg = open_config(arm.config, arm.cfg_options)
    # Reading the file has imported its modules, but not those of the arm's cfg_options.
    if cfg.get('custom_imports'):
        import_modules_from_strings(**cfg.custom_imports)
    if 'lr' not in (cfg.get('optim_wrapper') or {}).get('optimizer', {}):
        raise StudyError(f'{arm.config} has no optim_wrapper.optimizer.lr; add it')
    kinds = [str(type_name(node)) for node in dicts(cfg.get('param_scheduler'))]
    if cycles := [kind for kind in kinds if kind.startswith('OneCycle')]:
        raise StudyError(
            f'{arm.config} has {cycles[0]}, whose eta_max replaces the learning rate '
            'that a study tunes; use another param_scheduler'
        )
    return cfg


def config_rate(arm: Arm) -> float:
    """Return the learning rate of an arm's config, which a search starts at."""
    return float(arm_config(arm).optim_wrapper.optimizer.lr)


def run_config(study: Study, run: Run) -> Config:
    """Return the config of a run: the arm's, with its learning rate, seed and work dir."""
    cfg = arm_config(run.arm)
    factor = run.lr / cfg.optim_wrapper.optimizer.lr
    for node in dicts(cfg.get('param_scheduler')):
        if factor != 1 and (str(type_name(node)).endswith('LR') or node.get('param_name') == 'lr'):
            # The lowest rate of a schedule would be above small rates.
            for key in {'eta_min', 'min_value'} & node.keys():
                node[key] = (node[key] or 0) * factor
    _set_run(cfg, run.lr, run.seed)
    cfg.work_dir = str(study.work_dir / run.arm.name / run.name)
    cfg.experiment_name = f'{study.name}_{run.arm.name}_{run.name}'
    return cfg


def _set_run(cfg: Config, lr: float, seed: int) -> None:
    cfg.optim_wrapper.optimizer.lr = lr
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)


def go_on(cfg: Config) -> None:
    """Resume a run from its own checkpoint if its config is unchanged, else start again."""
    folder = Path(cfg.work_dir)
    latest, kept = folder / 'last_checkpoint', folder / CONFIG_NAME
    content = json.dumps(cfg.to_dict(), default=str)
    same = kept.is_file() and kept.read_text() == content
    # CheckpointHook removes the old checkpoint before it writes the next one: after a kill in
    # between, last_checkpoint names a file that no longer exists.
    if same and latest.is_file() and is_whole(latest.read_text().strip()):
        # mmengine would resume load_from instead of the latest checkpoint.
        cfg.resume, cfg.load_from = True, None
        return
    cfg.resume = False
    for path in (latest, folder / VALIDATIONS_NAME):
        path.unlink(missing_ok=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(content, kept)


def config_digest(arm: Arm) -> str:
    """Return a digest of an arm's config, without the rate, seed and names of single runs."""
    cfg = arm_config(arm)
    _set_run(cfg, 0.0, 0)
    content = cfg.to_dict()
    for key in ('work_dir', 'experiment_name'):
        content.pop(key, None)
    return sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()[:12]


def result_head(study: Study, run: Run) -> dict:
    """Return the entries of all results that identify their run."""
    return dict(study=study.name, arm=run.arm.name, lr=run.lr, seed=run.seed)


def versions() -> dict[str, str]:
    """Return the versions of the packages in use."""
    return dict(torch=torch.__version__, mmengine=mmengine.__version__, mmexpand=__version__)


def arm_problem(arm: Arm) -> str | None:
    """Return the reason why no run of an arm can start; None if runs can start."""
    try:
        cfg = arm_config(arm)
        check_datasets(cfg, ('train', 'val', 'test'))
        warn_of_lost_hooks(cfg)
        if configured_expansions(cfg):
            build_expanded_model(cfg)
    # A config is a program and can raise anything; the other arms continue.
    except Exception as error:
        return f'{arm.name} cannot run: {error}'
    return None


def shares_images(cfg: Config) -> bool:
    """Return whether results are reported on the images that learning rates are chosen by."""
    return cfg.val_dataloader.get('dataset') == cfg.test_dataloader.get('dataset')


def train(study: Study, run: Run) -> dict:
    """Train, and evaluate the last weights (EMAHook's if present) on both splits.

    Returns:
        The content of the result file.
    """
    torch.set_num_threads(study.threads)
    # Denormal numbers are ten times slower, and irrelevant for training.
    torch.set_flush_denormal(True)
    cfg = run_config(study, run)
    go_on(cfg)
    runner = build_runner(cfg, ('train', 'val', 'test'))
    if study.channels_last:
        runner.model.to(memory_format=torch.channels_last)
    hook = RecordHook()
    runner.register_hook(hook)
    result = dict(result_head(study, run), config=config_digest(run.arm))
    started = round(time.time())
    try:
        runner.train()
    except Diverged as error:
        return dict(result, status='diverged', reason=str(error), loss=hook.record['loss'])
    curve = hook.record['val']
    if not curve or curve[-1][0] != runner.iter:
        runner.val_loop.run()
    return dict(
        result,
        status='ok',
        val=curve[-1][1],
        # Not runner.test(): its hooks would start EMAHook's averages again.
        test=numbers(runner.test_loop.run()),
        curve=[[step, metrics.get(study.metric)] for step, metrics in curve],
        loss=hook.record['loss'],
        seconds=round(hook.record['seconds'], 2),
        period=[started, round(time.time())],
        steps=runner.iter,
        parameters=sum(p.numel() for p in runner.model.parameters()),
        test_is_val=shares_images(runner.cfg),
        versions=versions(),
    )


def write_json(content: object, path: Path) -> None:
    """Write JSON, whole or not at all; lists of numbers stay on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        lines = [f'  {json.dumps(key)}: {json.dumps(value)}' for key, value in content.items()]
        text = '{\n' + ',\n'.join(lines) + '\n}\n'
    else:
        text = json.dumps(content, indent=1) + '\n'
    write_text(text, path)


def main() -> None:
    """Run ``python -m mmexpand.study STUDY.py ARM LR SEED``."""
    import fcntl  # Not on Windows.

    parser = argparse.ArgumentParser(description='One run of a study')
    parser.add_argument('study')
    parser.add_argument('arm')
    parser.add_argument('lr', type=float)
    parser.add_argument('seed', type=int)
    args = parser.parse_args()
    study = load_study(args.study)
    run = Run(study.arm(args.arm), args.lr, args.seed)
    folder = study.work_dir / run.arm.name / run.name
    folder.mkdir(parents=True, exist_ok=True)
    # The process of a killed study may still train this run.
    with open(folder / LOCK_NAME, 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f'{run}: another process trains this run; waiting for its end')
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_final(load_result(study, run)):
            log(f'{run} has a result; remove {study.result_path(run)} to run it again')
            return
        write_json(_tried(study, run), study.result_path(run))


def _tried(study: Study, run: Run) -> dict:
    try:
        return train(study, run)
    except Exception as error:
        traceback.print_exc()
        reason = f'{type(error).__name__}: {error}'
        return dict(result_head(study, run), status='failed', reason=reason)
