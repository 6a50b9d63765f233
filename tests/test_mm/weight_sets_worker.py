"""Each process of test_weight_sets.py: trainings in which one rank fails.

Writes the message of each rank's error, '' if there was none, beside the case's work dir.
"""

import json
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.datasets import CityscapesDataset
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder

from mmexpand import ExpandedConv2d
from mmexpand.mm import contraction
from mmexpand.mm.hooks import ContractHook
from mmexpand.mm.runtime import prepare_cpu
from tests.conftest import small_config
from tests.processes import work

FAULTS = {
    'copy': (contraction, 'copy_model'),
    'contract': (ExpandedConv2d, 'to_conv'),
    'evaluate': (EncoderDecoder, 'val_step'),
    'read': (CityscapesDataset, '__getitem__'),
    'metric': (IoUMetric, 'compute_metrics'),
    'write': (contraction, 'save_checkpoint'),
}
CASES = [
    ('none', 0),
    *((stage, rank) for stage in ('copy', 'evaluate', 'read') for rank in (0, 1)),
    *((stage, 0) for stage in ('contract', 'metric', 'write')),
]


def broken(stage: str, rank: int):
    """A context in which a stage fails on a rank."""
    if stage == 'none' or dist.get_rank() != rank:
        return mock.MagicMock()
    error = RuntimeError(f'broken {stage}')
    return mock.patch.object(*FAULTS[stage], side_effect=error)


def run(cfg, directory: Path) -> None:
    message = ''
    try:
        Runner.from_cfg(cfg).train()
    except Exception as error:
        message = str(error)
    (directory / f'message_{dist.get_rank()}.json').write_text(json.dumps(message))
    DefaultScope._instance_dict.clear()
    dist.barrier()


def make_config(street: str, directory: Path):
    directory.mkdir(exist_ok=True)
    cfg = small_config(street, directory / 'work_dir')
    cfg.launcher = 'pytorch'
    cfg.default_hooks.checkpoint.save_best = 'mIoU'
    cfg.custom_hooks.insert(1, dict(type='EMAHook'))
    cfg.train_cfg.max_iters = 2
    prepare_cpu(cfg)
    return cfg


def main(street: str, root: Path) -> None:
    contract = ContractHook._contract
    for stage, rank in CASES:
        directory = root / f'{stage}{rank}'
        cfg = make_config(street, directory)

        def only_best(self, runner, name, *args, stage=stage, rank=rank):
            with broken(stage if name == 'best' else 'none', rank):
                contract(self, runner, name, *args)

        with mock.patch.object(ContractHook, '_contract', only_best):
            run(cfg, directory)
    cfg = make_config(street, root / 'dry1')
    with broken('evaluate', 1):
        run(cfg, root / 'dry1')


if __name__ == '__main__':
    work(lambda arguments: main(arguments[0], Path(arguments[1])))
