"""Workers in several processes: how they are started, and how they end."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port


def run_workers(
    worker: Path, *arguments: object, processes: int = 2, timeout: float = 600
) -> subprocess.CompletedProcess:
    """Run a script in several processes, which torch.distributed connects.

    A rank that waits for another for ever is what the timeout finds.
    """
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}']
    command += [f'--master_port={get_free_port()}', str(worker), *map(str, arguments)]
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, env=env
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
