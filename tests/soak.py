"""Trainings that are killed, or cannot write, and must end as if nothing had happened.

python -m tests.soak --runs 20
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from mmexpand.surgery.checkpoint import CheckpointError, load_checkpoint

from .conftest import draw_street, small_config
from .tools_in_process import become

ROOT = Path(__file__).parents[1]
TIMEOUT = 600
SMALL_FILES = 8192
"""The largest file, in bytes, on a 'full disk': less than any checkpoint."""


@dataclass(frozen=True)
class Fault:
    """A fault of a training, and its time.

    Attributes:
        what: 'kill', 'kill one rank', 'full disk' or 'no folder'.
        when: 'any time', or a key of MOMENTS.
        processes: that train.
    """

    what: str
    when: str
    processes: int = 1

    def __str__(self) -> str:
        return f'{self.what}, {self.when}, {self.processes} process(es)'


FAULTS = [
    Fault('kill', 'any time'),
    Fault('kill', 'checkpoint'),
    Fault('kill', 'evaluation'),
    Fault('kill', 'contraction'),
    Fault('kill', 'compact file'),
    Fault('kill one rank', 'any time', 2),
    Fault('full disk', 'checkpoint'),
    Fault('full disk', 'contraction'),
    Fault('no folder', 'evaluation'),
    Fault('kill one rank', 'contraction', 2),
]


class Alone:
    """A script in a process that imports nothing again, with the part of Popen that is used."""

    def __init__(self, command: list[str]):
        self._folder = tempfile.TemporaryDirectory()
        # A pipe: a limit on the size of files does not apply to it.
        said = Path(self._folder.name, 'said')
        os.mkfifo(said)
        self._process = become(command, (said, said))
        self.pid = self._process.pid
        self.stdout = said.open()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired('train.py', timeout)
        return self._process.exitcode


class Training:
    """tools/train.py in processes of its own.

    Attributes:
        output: what it has written so far, by line.
    """

    def __init__(self, config: Path, processes: int, resume: bool):
        command = [str(ROOT / 'tools/train.py'), str(config)] + ['--resume'] * resume
        self.output: list[str] = []
        if processes > 1:
            launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}']
            launcher += [f'--master_port={get_free_port()}']
            self._process = subprocess.Popen(
                [sys.executable, *launcher, *command, '--launcher', 'pytorch'],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                # A process that is aborted says where.
                env=dict(
                    os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONFAULTHANDLER='1'
                ),
            )
        else:
            self._process = Alone(command)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> 'Training':
        return self

    def __exit__(self, *_: object) -> None:
        # It is in a session of its own: nothing else would end it with the soak.
        if self.running:
            self.kill()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.output.append(line)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Without a chance to clean up."""
        if isinstance(self._process, Alone):
            os.kill(self._process.pid, signal.SIGKILL)
        else:
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill_one_rank(self, rng: random.Random) -> None:
        pid = self._process.pid
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
        if children:
            os.kill(int(rng.choice(children)), signal.SIGKILL)
        else:
            self.kill()

    def fill_disk(self) -> None:
        """From now on no file can be written beyond a few bytes."""
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (SMALL_FILES, SMALL_FILES))

    def wait(self) -> int:
        try:
            code = self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f'the training hangs:\n{self.tail()}') from None
        self._reader.join(10)
        return code

    def tail(self) -> str:
        return ''.join(self.output[-30:])


def _says(*words: str):
    return lambda training, _: any(w in line for line in list(training.output) for w in words)


MOMENTS = {
    'checkpoint': lambda _, work_dir: any(work_dir.glob('iter_*.pth')),
    'evaluation': _says('Iter(val)'),
    'contraction': _says('contracting and verifying'),
    'compact file': lambda _, work_dir: any(work_dir.glob('*compact_*.pth*')),
}


@dataclass
class Soak:
    """Undisturbed trainings, and disturbed ones to compare with them.

    Attributes:
        root: a folder of its own.
        seed: of the moments.
    """

    root: Path
    seed: int = 0
    _undisturbed: dict[int, tuple[Path, float]] = field(default_factory=dict)

    def undisturbed(self, processes: int) -> tuple[Path, float]:
        """The work dir of a training to its end, and how many seconds it took."""
        if processes not in self._undisturbed:
            config, work_dir = self._config(f'undisturbed_{processes}')
            start = time.monotonic()
            with Training(config, processes, resume=False) as training:
                assert training.wait() == 0, training.tail()
            self._undisturbed[processes] = work_dir, time.monotonic() - start
        return self._undisturbed[processes]

    def run(self, index: int, fault: Fault) -> str:
        """Disturb a training, resume it, and compare its end; returns what was hit."""
        expected, seconds = self.undisturbed(fault.processes)
        rng = random.Random(f'{self.seed} {index}')
        config, work_dir = self._config(f'run_{index}')
        with Training(config, fault.processes, resume=False) as training:
            _wait_for(fault.when, training, work_dir, rng, seconds)
            hit = training.running
            code = _disturb(fault, training, work_dir, rng)
        assert not hit or code != 0, f'{fault}: it ended as if all was well\n{training.tail()}'
        check_whole(work_dir)
        state = ', '.join(sorted(p.name for p in work_dir.glob('*.pth'))) or 'no checkpoint'
        with Training(config, fault.processes, resume=True) as resumed:
            assert resumed.wait() == 0, f'{fault}: it cannot be resumed\n{resumed.tail()}'
        check_whole(work_dir)
        check_same_end(expected, work_dir)
        return f'{"hit" if hit else "too late"}, left {state}'

    def _config(self, name: str) -> tuple[Path, Path]:
        street = self.root / 'street'
        if not street.exists():
            draw_street(street)
        work_dir = self.root / name
        changes = {
            'train_cfg.max_iters': 12,
            'train_cfg.val_interval': 4,
            'default_hooks.checkpoint.interval': 2,
            'default_hooks.checkpoint.save_best': 'mIoU',
            'experiment_name': 'soak',
            'custom_hooks': [
                dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2),
                dict(type='EMAHook', momentum=0.1),
                dict(type='ContractHook'),
            ],
        }
        path = self.root / f'{name}.py'
        small_config(street, work_dir, **changes).dump(path)
        return path, work_dir


def _wait_for(
    when: str, training: Training, work_dir: Path, rng: random.Random, seconds: float
) -> None:
    if when == 'any time':
        end = time.monotonic() + rng.uniform(0, seconds)
        while training.running and time.monotonic() < end:
            time.sleep(0.01)
        return
    while training.running and not MOMENTS[when](training, work_dir):
        time.sleep(0.001)
    # Not always its very first instant.
    time.sleep(rng.choice([0, 0, 0.003, 0.03]))


def _disturb(fault: Fault, training: Training, work_dir: Path, rng: random.Random) -> int:
    if not training.running:
        return training.wait()
    if fault.what == 'kill':
        training.kill()
    elif fault.what == 'kill one rank':
        training.kill_one_rank(rng)
    elif fault.what == 'full disk':
        training.fill_disk()
    else:
        return _without_folder(training, work_dir)
    return training.wait()


def _without_folder(training: Training, work_dir: Path) -> int:
    """Take the work dir away for the rest of the training: root may write to any folder."""
    away = work_dir.with_name(f'{work_dir.name}_away')
    work_dir.rename(away)
    work_dir.write_text('no folder')
    try:
        return training.wait()
    finally:
        work_dir.unlink()
        away.rename(work_dir)


def check_whole(work_dir: Path) -> None:
    """Files that a user or the next resume takes for whole are whole.

    Raises:
        AssertionError: naming the file that is not.
    """
    taken = list(work_dir.glob('compact_*.pth'))
    pointer = work_dir / 'last_checkpoint'
    # mmengine writes the pointer in place: a kill leaves it empty, and the resume passes over it.
    if pointer.exists() and (named := pointer.read_text()):
        taken.append(Path(named))
    for path in taken:
        try:
            assert load_checkpoint(path)['state_dict'], f'{path.name} holds no weights'
        except CheckpointError as error:
            raise AssertionError(f'taken for whole: {error}') from None


def check_same_end(expected: Path, work_dir: Path) -> None:
    """The same files, with the same weights bit for bit.

    ``best`` is not compared: mmengine does not repeat the validation that a fault has cut off.
    """
    for name in ('compact_last.pth', 'compact_ema.pth', 'iter_12.pth'):
        ours, theirs = (load_checkpoint(d / name)['state_dict'] for d in (work_dir, expected))
        assert list(ours) == list(theirs), name
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), f'{name}: {key} is not what it would have been'
    configs = [(d / 'compact_config.py').read_text() for d in (work_dir, expected)]
    assert configs[0].replace(work_dir.name, expected.name) == configs[1], 'compact_config.py'


def cut_short(path: Path, cuts: int, rng: random.Random) -> int:
    """Cut a checkpoint at random lengths; returns how many were refused."""
    content = path.read_bytes()
    cut = path.with_name('cut.pth')
    refused = 0
    for length in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(cuts - 2))]:
        cut.write_bytes(content[:length])
        try:
            load_checkpoint(cut)
        except CheckpointError:
            refused += 1
    cut.unlink()
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=20, help='trainings to disturb')
    parser.add_argument('--cuts', type=int, default=200, help='checkpoints to cut short')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        soak = Soak(Path(root), args.seed)
        for index in range(args.runs):
            fault = FAULTS[index % len(FAULTS)]
            try:
                result = soak.run(index, fault)
            except AssertionError as error:
                failed += 1
                result = f'FAILED: {error}'
            print(f'{index + 1:3}/{args.runs} {fault}: {result}', flush=True)
        whole, _ = soak.undisturbed(1)
        rng = random.Random(args.seed)
        refused = cut_short(whole / 'iter_12.pth', args.cuts, rng)
    print(f'{args.runs - failed} of {args.runs} trainings ended with the undisturbed weights')
    print(f'{refused} of {args.cuts} truncated checkpoints were refused')
    sys.exit(failed > 0 or refused < args.cuts)


if __name__ == '__main__':
    main()
