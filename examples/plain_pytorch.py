"""Train a small classifier with mmexpand in plain PyTorch: expand, train, contract, verify, save.

python examples/plain_pytorch.py

The script draws its own data, and downloads nothing. A run takes seconds on a CPU. Replace
``network`` and ``draw_shapes`` by your own.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmexpand

SIZE, SHAPES = 24, ('disc', 'square', 'cross')


def draw_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images ``(count, 1, 24, 24)`` of noisy shapes, and the index of each image's shape."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    centre = 8 + 8 * torch.rand(count, 2, 1, 1, generator=generator)
    radius = 3 + 3 * torch.rand(count, 1, 1, generator=generator)
    grid = torch.arange(SIZE, dtype=torch.float32)
    y, x = (grid[:, None] - centre[:, 0]).abs(), (grid[None, :] - centre[:, 1]).abs()
    disc, square = x**2 + y**2 < radius**2, torch.maximum(x, y) < radius
    cross = square & (torch.minimum(x, y) < radius / 3)
    shapes = torch.stack((disc, square, cross), 1).float()
    images = shapes[torch.arange(count), labels]
    return (images + 0.3 * torch.randn(images.shape, generator=generator))[:, None], labels


def network() -> nn.Sequential:
    """Return the compact network, which is deployed."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, len(SHAPES)),
    )


def train(model: nn.Module, steps: int, lr: float = 0.02) -> list[float]:
    """Train on new images in each step, and return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    model.train()
    for step in range(steps):
        images, labels = draw_shapes(64, seed=step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose shape is recognised."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description='Train, contract and save a small classifier')
    parser.add_argument('--steps', type=int, default=200, help='training steps')
    parser.add_argument('--out', type=Path, default='compact.pth', help='file of the weights')
    args = parser.parse_args()

    torch.manual_seed(0)
    model = network()
    # The network has random weights, so that blocks use their own initialisation. Without init,
    # the weights of the network are preserved.
    plan = mmexpand.plan(model, method='repvgg', init='default')
    print(plan)
    mmexpand.expand_(model, plan)

    losses = train(model, args.steps)
    print(f'loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last')

    images, labels = draw_shapes(1000, seed=1_000_000)
    compact = mmexpand.contract(model)
    errors = mmexpand.verify(model, compact, lambda net: net(images))
    print(f'largest relative error of the contraction: {errors.max_error:.1e}')
    torch.save(compact.state_dict(), args.out)

    deployed = network()  # Contains nothing of mmexpand.
    deployed.load_state_dict(torch.load(args.out, weights_only=True))
    for name, net in (('expanded', model), ('deployed', deployed)):
        parameters = sum(p.numel() for p in net.parameters())
        print(f'{name}: {parameters} parameters, accuracy {accuracy(net, images, labels):.3f}')


if __name__ == '__main__':
    main()
