"""Each process of test_distributed.py: three trainings that must agree.

Compact-size gradients under DDP, plain DDP, and one process with the whole batch. Prints, on
rank 0, what was found out as JSON.
"""

import copy
import json
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mmexpand
from mmexpand.surgery.distributed import reduce_compact

STEPS = 20
ROWS = 8


class Net(nn.Module):
    """A shared layer, one with groups, one that not every step uses, one that is read only."""

    def __init__(self, case: str):
        super().__init__()
        kind = nn.ConvTranspose2d if case == 'transposed' else nn.Conv2d
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = kind(8, 8, 3, padding=1, groups=2, bias=False)
        self.sometimes = kind(8, 8, 3, padding=1)
        self.neck = nn.Conv2d(8, 4, 5)
        self.head = nn.Linear(64, 5)
        attends = case == 'attention'
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if attends else None
        self.use_sometimes = True
        self.checkpoints = case == 'checkpointed'
        self.reentrant = case == 'reentrant'

    def forward(self, x):
        x = self.stem(x).relu()
        if self.checkpoints:
            x = checkpoint(self.twice_shared, x, use_reentrant=False)
        else:
            x = self.twice_shared(x)
        if self.use_sometimes:
            x = self.sometimes(x)
        # The last layers: their backward pass is inside another one, which it begins.
        return checkpoint(self.end, x, use_reentrant=True) if self.reentrant else self.end(x)

    def end(self, x):
        x = self.neck(x.relu())
        if self.attention is not None:
            # It never calls its `out_proj`, but reads weight and bias.
            pixels = x.flatten(2).transpose(1, 2)
            x = x + self.attention(pixels, pixels, pixels)[0].transpose(1, 2).view_as(x)
        return self.head(x.flatten(1))

    def twice_shared(self, x):
        return self.shared(self.shared(x).relu())


def expanded_net(case: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net(case).double()
    if case == 'frozen':
        net.stem.requires_grad_(False)
    include = ['stem', 'shared', 'sometimes', 'neck']
    if case == 'attention':
        include.append('attention.out_proj')
    shortcut = case == 'shortcut'
    method = case if case in ('orepa', 'do', 'rep', 'ac') else 'cl+fc'
    cfg = mmexpand.ExpandConfig(method, 4, include=include, shortcut=shortcut)
    mmexpand.expand_(net, cfg)
    if case == 'frozen':
        net.neck.factors[0].requires_grad_(False)
    return net


def count_bytes(wrapper: DistributedDataParallel, counter: list) -> None:
    """Counts what is reduced, and reduces it as DDP would."""

    def hook(_, bucket):
        counter[0] += bucket.buffer().numel() * bucket.buffer().element_size()
        buffer = bucket.buffer().div_(dist.get_world_size())
        dist.all_reduce(buffer)
        reduced = torch.futures.Future()
        reduced.set_result(buffer)
        return reduced

    wrapper.register_comm_hook(None, hook)


def train_step(model, optimizer, batches, clip):
    """One optimizer step over one or several batches; returns the losses of this process."""
    losses = []
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        wait = nullcontext() if last or not hasattr(model, 'no_sync') else model.no_sync()
        with wait:
            loss = model(batch).square().mean() / len(batches)
        # As mmengine does: the backward pass is outside the context.
        loss.backward()
        losses.append(loss.detach())
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(losses).sum()


def run_empty() -> None:
    """Anchor the norms of a block with an empty batch on one rank, and with none at all."""
    torch.manual_seed(0)
    unit = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    mmexpand.expand_(unit, method='repvgg')
    unit(torch.zeros(0, 3, 9, 9).double())
    unanchored = not any(norm.is_anchored for norm in unit[0]._norms)
    x = torch.randn(2, 3, 9, 9).double()
    unit(x if dist.get_rank() == 0 else x[:0])
    means = torch.stack([norm.norm.running_mean for norm in unit[0]._norms[:2]])
    others = means.clone()
    dist.broadcast(others, 0)
    same = torch.tensor(int(torch.allclose(means, others) and means.abs().min() > 0))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        anchored = all(norm.is_anchored for norm in unit[0]._norms)
        result = dict(unanchored=unanchored, anchored=anchored, same=bool(same))
        print(json.dumps({'empty': result}), flush=True)


def run(case: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    options = {
        'unused': dict(find_unused_parameters=True),
        'static': dict(static_graph=True),
        'views': dict(gradient_as_bucket_view=True),
    }.get(case, {})
    nets = [expanded_net(case) for _ in range(3)]
    if rank > 0:
        # DDP gives every process the parameters of rank 0.
        for parameter in nets[0].parameters():
            parameter.data.add_(1)
    compact = reduce_compact(nets[0], lambda m: DistributedDataParallel(m, **options))
    plain = DistributedDataParallel(nets[1], **options)
    counters = [0], [0]
    if case != 'static':
        # A static graph reduces everything at the end of its first step.
        count_bytes(compact, counters[0])
        count_bytes(plain, counters[1])
    models = compact, plain, nets[2]
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05, momentum=0.9)
        for m in models
    ]
    torch.manual_seed(1)
    worst, losses = 0.0, []
    for step in range(STEPS):
        batches = [torch.randn(ROWS, 3, 8, 8).double() for _ in range(3 if case == 'sum' else 1)]
        shards = [batch.chunk(world)[rank] for batch in batches]
        results = []
        for net, model, optimizer in zip(nets, models, optimizers, strict=True):
            net.use_sometimes = case != 'unused' or step % 2 == 0
            whole = model is net
            loss = train_step(model, optimizer, batches if whole else shards, case == 'clip')
            if not whole:
                dist.all_reduce(loss)
                loss /= world
            results.append(loss.item())
        worst = max(worst, *(abs(results[0] - other) for other in results[1:]))
        losses.append(results[0])
    same = True
    for parameter in nets[0].parameters():
        of_rank_0 = parameter.detach().clone()
        dist.broadcast(of_rank_0, 0)
        same &= torch.equal(parameter, of_rank_0)
    same = torch.tensor(int(same))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    difference = max(
        (p - q).abs().max().item()
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    )
    contracted = mmexpand.contract(nets[0])
    if rank == 0:
        trained = [p for p in contracted.parameters() if p.requires_grad]
        result = dict(
            worst_loss_difference=worst,
            first_loss=losses[0],
            last_loss=losses[-1],
            factors_identical=bool(same.item()),
            factors_difference=difference,
            bytes_compact=counters[0][0] / STEPS,
            bytes_plain=counters[1][0] / STEPS,
            bytes_of_compact_network=sum(p.numel() * p.element_size() for p in trained),
            state_dict_keys=len(nets[0].state_dict()) == len(nets[2].state_dict()),
            copies=not hasattr(copy.deepcopy(nets[0]).neck.folded_parameter, 'weight'),
        )
        print(json.dumps({case: result}), flush=True)


if __name__ == '__main__':
    dist.init_process_group('gloo')
    for case in sys.argv[1:]:
        run_empty() if case == 'empty' else run(case)
    dist.destroy_process_group()
