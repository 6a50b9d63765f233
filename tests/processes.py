"""Workers in several processes: how they are started, and how they end."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port

from tests.tools_in_process import become


def run_workers(
    worker: Path, *arguments: object, processes: int = 2, timeout: float = 600
) -> subprocess.CompletedProcess:
    """Run a script in several processes, which torch.distributed connects, without a launcher.

    Nothing is imported again. A rank that waits for another for ever is what the timeout finds.
    """
    command = [str(part) for part in (worker, *arguments)]
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(get_free_port()))
    shared |= dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f'out{r}'), Path(folder, f'err{r}')) for r in range(processes)]
        ranks = [
            become(command, files, env=dict(os.environ, **shared, RANK=str(r), LOCAL_RANK=str(r)))
            for r, files in enumerate(outputs)
        ]
        _wait_for(ranks, timeout)
        out, err = (''.join(files[i].read_text() for files in outputs) for i in (0, 1))
    code = max(abs(rank.exitcode) for rank in ranks)
    assert code == 0, out[-2000:] + err[-3000:]
    return subprocess.CompletedProcess(command, code, out, err)


def _wait_for(ranks: list, timeout: float) -> None:
    """Wait for processes to end; kill the others after a failure or the timeout."""
    running, end = {rank.sentinel: rank for rank in ranks}, time.monotonic() + timeout
    failed = False
    while running and not failed and time.monotonic() < end:
        for sentinel in wait([*running], end - time.monotonic()):
            failed |= running.pop(sentinel).exitcode != 0
    for rank in running.values():  # It waits for a rank that has failed.
        rank.join(1)
        rank.kill()
        rank.join()


def launch(script: Path, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script by torch's launcher in fresh processes, as tools/dist_train.sh does."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}']
    command += [f'--master_port={get_free_port()}', str(script), *map(str, arguments)]
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def work(main: Callable[[list[str]], None]) -> None:
    """Run ``main`` with the arguments of a worker's script, in a process group.

    No destructors run: DDP wrappers hold the process group, and gloo's threads abort the process
    ("terminate called") when it goes before they do.
    """
    dist.init_process_group('gloo')
    main(sys.argv[1:])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
