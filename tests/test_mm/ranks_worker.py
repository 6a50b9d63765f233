"""Each process of test_ranks.py: a training of two ranks that draw differently.

Writes the factors that each rank has at the end, and how far its start was from the checkpoint,
beside the work dir.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from mmdet.utils import reduce_mean
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from torch import nn

from mmexpand.mm.checkpoints import unwrap
from mmexpand.mm.models import build_compact_model
from mmexpand.mm.runtime import prepare_cpu
from mmexpand.mm.start import StartHook
from tests.conftest import small_config
from tests.processes import work


@MODELS.register_module()
class Averaging(EncoderDecoder):
    """A layer that the loss alone reaches, and a loss that is averaged over ranks, as mmdet's."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.auxiliary = nn.Conv2d(3, 2, 3)

    def loss(self, inputs, data_samples):
        losses = super().loss(inputs, data_samples)
        count = reduce_mean(inputs.new_tensor(float(len(inputs))))
        losses['loss_auxiliary'] = self.auxiliary(inputs).square().mean() / count
        return losses


def main(street: str, directory: Path, hooks: str) -> None:
    cfg = small_config(street, directory / 'work_dir', **{'model.type': 'Averaging'})
    if hooks == 'quant':
        # Each rank has statistics of its own batches until the hook starts.
        cfg.custom_hooks = [dict(type='QuantHook', start=0.5)]
    elif hooks in ('one', 'norms'):
        cfg.custom_hooks[0].include = ['backbone.encoder', 'auxiliary']
        if hooks == 'norms':
            # From the half on the norms of all ranks have the same statistics.
            cfg.custom_hooks[0].update(method='repvgg', freeze_norms=0.5)
    else:
        # The first one's reduction at compact size has to give way to the second's.
        how = dict(layerwise=dict(forward='layerwise'), factors=dict(compact_gradients=False))
        more = dict(type='ExpandHook', include='auxiliary', method='cl', rate=2, **how[hooks])
        cfg.custom_hooks.insert(1, more)
    cfg.randomness = dict(seed=0, diff_rank_seed=True)
    # Each rank has other gradients of its own, and must scale the averaged ones alike.
    cfg.optim_wrapper.clip_grad = dict(max_norm=0.01)
    cfg.launcher = 'pytorch'
    prepare_cpu(cfg)
    cfg.load_from = str(directory / 'compact.pth')
    if dist.get_rank() == 0:
        torch.save(dict(state_dict=build_compact_model(cfg).state_dict()), cfg.load_from)
    dist.barrier()
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = unwrap(runner.model)
    factors = dict(model.named_parameters())
    factors |= {name: v for name, v in model.state_dict().items() if '.repvgg.' in name}
    torch.save(factors, directory / f'factors_{dist.get_rank()}.pth')
    if hooks == 'quant':
        torch.save(model.state_dict(), directory / f'factors_{dist.get_rank()}.pth')
        return
    start = next(hook.words for hook in runner.hooks if isinstance(hook, StartHook))
    (directory / f'start_{dist.get_rank()}.txt').write_text(start)


if __name__ == '__main__':
    work(lambda arguments: main(arguments[0], Path(arguments[1]), arguments[2]))
