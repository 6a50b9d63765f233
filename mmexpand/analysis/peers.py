"""Training-time blocks of other papers, as peers for the benchmark of training steps.

Each takes the place of a convolution while training and can be merged into it afterwards, as an
expanded unit can; but each has a batch normalisation in every branch, so that the branches must
be run over the image. Written from the papers for timing: merging is left out.
"""

from collections.abc import Iterable

from torch import Tensor, nn


class RepVGGBlock(nn.Module):
    """KxK, 1x1 and, where shapes allow, identity; each with batch normalisation, then summed.

    Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, Sec. 3.2-3.3.

    Args:
        conv: the convolution that the block stands for: square, odd, not grouped or dilated, and
            padded so that a stride of 1 keeps the size.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        m, n, k, stride = _geometry(conv)
        self.branches = nn.ModuleList([_conv_bn(m, n, k, stride), _conv_bn(m, n, 1, stride)])
        if m == n and stride == 1:
            self.branches.append(nn.BatchNorm2d(n))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(N, m, H, W)``; the shape out is the convolution's."""
        return sum(branch(x) for branch in self.branches)


class ACBlock(nn.Module):
    """KxK, 1xK and Kx1, each with batch normalisation, then summed.

    Source: Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric
    Convolution Blocks", ICCV 2019, Sec. 3.3.

    Args:
        conv: as in ``RepVGGBlock``.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        m, n, k, stride = _geometry(conv)
        kernels = (k, k), (1, k), (k, 1)
        self.branches = nn.ModuleList(_conv_bn(m, n, kernel, stride) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(N, m, H, W)``; the shape out is the convolution's."""
        return sum(branch(x) for branch in self.branches)


class DiverseBranchBlock(nn.Module):
    """KxK; 1x1; 1x1 then KxK; 1x1 then average pooling: batch normalised at each, then summed.

    The inner width of the third branch is that of the input. Where the second layer of a branch
    pads, it pads with zeros; merging exactly at the border would ask for the value that the first
    normalisation gives a zero, which costs more, not less.

    Source: Ding et al., "Diverse Branch Block: Building a Convolution as an Inception-like Unit",
    CVPR 2021, Sec. 3.3 and Fig. 2.

    Args:
        conv: as in ``RepVGGBlock``.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        m, n, k, stride = _geometry(conv)
        pool = nn.AvgPool2d(k, stride, k // 2)
        self.branches = nn.ModuleList(
            [
                _conv_bn(m, n, k, stride),
                _conv_bn(m, n, 1, stride),
                nn.Sequential(_conv_bn(m, m, 1, 1), _conv_bn(m, n, k, stride)),
                nn.Sequential(_conv_bn(m, n, 1, 1), pool, nn.BatchNorm2d(n)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(N, m, H, W)``; the shape out is the convolution's."""
        return sum(branch(x) for branch in self.branches)


PEERS: dict[str, type[nn.Module]] = {
    'RepVGG': RepVGGBlock,
    'ACNet': ACBlock,
    'DBB': DiverseBranchBlock,
}
"""Blocks by the name they are known under."""


def use_peer_(model: nn.Module, names: Iterable[str], peer: str) -> None:
    """Replace convolutions of a model by a peer's blocks, in place.

    Args:
        model: any model.
        names: module names of the convolutions.
        peer: a key of ``PEERS``.

    Raises:
        ValueError: for a convolution that the blocks are not written for; nothing is replaced.
    """
    blocks = {name: PEERS[peer](model.get_submodule(name)) for name in names}
    for name, block in blocks.items():
        parent, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(parent), attribute, block)


def _geometry(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Channels in and out, kernel size and stride."""
    k, stride = conv.kernel_size[0], conv.stride[0]
    plain = (conv.groups, *conv.dilation) == (1, 1, 1) and conv.padding_mode == 'zeros'
    square = conv.kernel_size == (k, k) and conv.stride == (stride, stride)
    if not (plain and square and k % 2 and conv.padding == (k // 2, k // 2)):
        raise ValueError(f'the peers replace plain, square, odd, padded convolutions, not {conv}')
    return conv.in_channels, conv.out_channels, k, stride


def _conv_bn(m: int, n: int, kernel: int | tuple[int, int], stride: int) -> nn.Sequential:
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(size // 2 for size in kernel)
    return nn.Sequential(nn.Conv2d(m, n, kernel, stride, padding, bias=False), nn.BatchNorm2d(n))
