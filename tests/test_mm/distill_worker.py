"""Each process of test_distill.py's distributed test: a student with a regressor.

Writes the weights that each rank ends with, and what its distributed wrapper reduces.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.runner import Runner

from mmexpand.mm.runtime import prepare_cpu
from tests.processes import work
from tests.test_mm.test_distill import distributed_config


def main(street: str, directory: Path, teacher: dict) -> None:
    cfg = distributed_config(street, directory / 'work_dir', teacher, batch_size=2)
    cfg.launcher = 'pytorch'
    prepare_cpu(cfg)
    runner = Runner.from_cfg(cfg)
    runner.train()
    buckets = runner.model.reducer._get_zeros_like_grad_buckets()
    found = dict(
        weights=runner.model.module.state_dict(),
        reduced=sum(p.numel() for bucket in buckets for p in bucket.gradients()),
    )
    torch.save(found, directory / f'rank_{dist.get_rank()}.pth')


if __name__ == '__main__':
    work(lambda arguments: main(arguments[0], Path(arguments[1]), json.loads(arguments[2])))
