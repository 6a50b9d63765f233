"""A unit's kernel as an expression of linear parts: factor, chain, sum, scale, filter, norm.

Every node is a module with a kernel ``(out, in / groups, kh, kw)`` and says four things: how it
folds (``fold``), how it is applied layer by layer (``forward``), what that costs (``fold_macs``,
``apply_macs``), and how it is given a kernel (``set_kernel``). Leaves, the factors, are torch's own
``nn.Conv2d`` and ``nn.Linear``, so that a framework's initialisation and its options reach them.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .algebra import Affine, compose, fold, fold_order, kernel_size
from .probe import Probe
from .site import margins, output_size
from .statistics import Normed, excess, join, part

Shape = tuple[int, int, int, int]
"""A kernel's shape ``(out, in / groups, kh, kw)``."""

Solve = Callable[[Tensor, list[Tensor], int], list[Tensor]]
"""Finds factors with a given product: kernel, present factors, groups -> factors in float64."""


class Node(nn.Module):
    """What all but the leaves are."""

    @property
    def shape(self) -> Shape:
        """The kernel's shape ``(out, in / groups, kh, kw)``."""
        raise NotImplementedError

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """The kernel and bias, computed in ``dtype``; differentiable.

        Args:
            dtype: what to compute in.
            probe: of a batch, where norms are to take its statistics; None: the running ones.
        """
        raise NotImplementedError

    def fold_macs(self) -> int:
        """Multiply-accumulate operations of folding."""
        return sum(fold_macs(node) for node in self.children())

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Operations of applying it layer by layer to one image, and the output's size."""
        raise NotImplementedError

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take values whose folding is this kernel and bias, to rounding.

        Raises:
            ValueError: if no values do, as in ``kernel_refusal``.
        """
        raise NotImplementedError

    def kernel_refusal(self) -> str:
        """Why no values fold to an arbitrary kernel; empty where some do."""
        return ''


def fold_node(node: nn.Module, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
    """The kernel and bias of a node or a leaf, computed in ``dtype``."""
    if isinstance(node, Node):
        return node.fold(dtype, probe)
    bias = None if node.bias is None else node.bias.to(dtype)
    return as_kernel(node.weight).to(dtype), bias


def shape_of(node: nn.Module) -> Shape:
    """The kernel's shape of a node or a leaf."""
    return node.shape if isinstance(node, Node) else tuple(as_kernel(node.weight).shape)


def fold_macs(node: nn.Module) -> int:
    """Multiply-accumulate operations of folding a node; none for a leaf."""
    return node.fold_macs() if isinstance(node, Node) else 0


def apply_macs(node: nn.Module, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Operations of applying a node or a leaf to one image, and the output's size."""
    if isinstance(node, Node):
        return node.apply_macs(size)
    if isinstance(node, nn.Conv2d):
        size = output_size(size, *geometry(node))
    return node.weight.numel() * size[0] * size[1], size


def set_kernel(node: nn.Module, kernel: Tensor, bias: Tensor | None) -> None:
    """Give a node or a leaf this kernel and bias."""
    if isinstance(node, Node):
        node.set_kernel(kernel, bias)
        return
    node.weight.copy_(kernel.reshape(node.weight.shape))
    if node.bias is not None:
        node.bias.copy_(bias)


def add_bias(node: nn.Module, shift: Tensor) -> None:
    """Shift the bias that a node, which has one, folds to."""
    if isinstance(node, (Chain, Sum)):
        add_bias(node[-1] if isinstance(node, Chain) else node[0], shift)
    elif isinstance(node, Scale):
        add_bias(node.node, shift / node.scale)
    elif isinstance(node, (Separable, Norm)):
        add_bias(node.pointwise if isinstance(node, Separable) else node.norm, shift)
    else:
        node.bias.add_(shift)


def kernel_refusal(node: nn.Module) -> str:
    """Why no values of a node fold to an arbitrary kernel; empty where some do."""
    return node.kernel_refusal() if isinstance(node, Node) else ''


def leaves(node: nn.Module) -> list[nn.Module]:
    """The factors in an expression."""
    kinds = nn.Conv2d, nn.Linear, Deviation
    return [module for module in node.modules() if isinstance(module, kinds)]


ROLES = ('outer', 'inner', 'scale')
"""Roles of parameters: of a chain's factors around the one with the layer's taps; of that one, and
of branches by themselves; and of scales and norms."""


def parameter_roles(expression: nn.Module) -> dict[str, str]:
    """The role of every parameter of an expression, by its name in it."""
    roles = {}
    # By place, not by class: frameworks convert norms to their own.
    scales = {m.norm if isinstance(m, Norm) else m for m in expression.modules() if _scales(m)}
    for name, module in expression.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            path = f'{name}.{key}'.lstrip('.')
            roles[path] = 'scale' if module in scales else 'inner'
    for name, module in expression.named_modules():
        if isinstance(module, Chain):
            # The second factor is the one that 'preserve' solves for.
            prefix = f'{name}.'.lstrip('.')
            for index in range(len(module)):
                for path in roles:
                    if index != 1 and path.startswith(f'{prefix}{index}.'):
                        roles[path] = 'outer' if roles[path] == 'inner' else roles[path]
        elif isinstance(module, Separable):
            for path in roles:
                if path.startswith(f'{name}.depthwise.'.lstrip('.')):
                    roles[path] = 'outer'
    return roles


def _scales(node: nn.Module) -> bool:
    return isinstance(node, (Scale, Norm))


def geometry(conv: nn.Conv2d) -> tuple[Sequence[int], ...]:
    """Kernel size, stride, padding and dilation of a convolution."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


def as_kernel(weight: Tensor) -> Tensor:
    """A linear layer's weight as a 1x1 kernel; a kernel as it is."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Values of the output channels, shaped to broadcast over an output or a kernel."""
    return values.view(-1, *(1,) * (like.dim() - 1))


class Chain(nn.ModuleList, Node):
    """Nodes applied one after another; its kernel is their product (Eq. 1).

    Args:
        nodes: the one applied first in front.
        groups: the number of groups, the same in all.
        solve: finds factors with a given product; None: no chain is asked for that.
        refuse: says of the factors' shapes why ``solve`` cannot, or ''.
    """

    def __init__(
        self,
        nodes: Sequence[nn.Module],
        groups: int,
        solve: Solve | None = None,
        refuse: Callable[[list[Shape], int], str] | None = None,
    ):
        super().__init__(nodes)
        self.groups = groups
        self._solve = solve
        self._refuse = refuse

    def forward(self, x: Tensor) -> Tensor:
        """Apply one node after another."""
        for node in self:
            x = node(x)
        return x

    @property
    def shapes(self) -> list[Shape]:
        """Kernel shapes of the nodes."""
        return [shape_of(node) for node in self]

    @property
    def shape(self) -> Shape:
        """The product's shape."""
        shapes = self.shapes
        return (shapes[-1][0], shapes[0][1], *kernel_size(shapes))

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """The product, multiplied in the cheapest order."""
        factors = [fold_node(node, dtype, probe) for node in self]
        if probe is not None and len(factors) == 2:  # Its bias has no gradient.
            return compose(*factors, self.groups)
        return fold(factors, self.groups)

    def fold_macs(self) -> int:
        """Operations of the products, in the cheapest order."""
        per_group = tuple((out // self.groups, *rest) for out, *rest in self.shapes)
        product = self.groups * fold_order(per_group, 0, len(self))[0]
        return product + sum(fold_macs(node) for node in self)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Operations of one node after another."""
        total = 0
        for node in self:
            macs, size = apply_macs(node, size)
            total += macs
        return total, size

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Solve for the factors; biases but the last are zeroed."""
        present = [as_kernel(factor.weight) for factor in self]
        new = self._solve(kernel, present, self.groups)
        for factor, value in zip(self, new, strict=True):
            factor.weight.copy_(value.view_as(factor.weight))
            if factor.bias is not None:
                factor.bias.zero_()
        if self[-1].bias is not None:
            self[-1].bias.copy_(bias)

    def kernel_refusal(self) -> str:
        """Why the factors are too narrow for an arbitrary kernel, or ''."""
        return self._refuse(self.shapes, self.groups)


class Sum(nn.ModuleList, Node):
    """Branches added up; kernels are centred and padded with zeros to the first one's size.

    Args:
        nodes: the branches; the first has the largest kernel, and takes what is set.
        padding: zeros that the first branch pads with, by axis: a smaller kernel that would have
            to pad with less than none crops the image.
        dilation: of the kernel, by axis.
    """

    def __init__(
        self, nodes: Sequence[nn.Module], padding: tuple[int, int], dilation: tuple[int, int]
    ):
        super().__init__(nodes)
        self._crops = [
            tuple(max(0, m * d - p) for m, p, d in zip(margin, padding, dilation, strict=True))
            for margin in (margins(self.shape[2:], shape_of(node)[2:]) for node in self)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Add up the branches' outputs."""
        outputs = [
            node(x[..., y : x.shape[-2] - y, z : x.shape[-1] - z] if y or z else x)
            for node, (y, z) in zip(self, self._crops, strict=True)
        ]
        return sum(outputs[1:], outputs[0])

    @property
    def shape(self) -> Shape:
        """The first branch's."""
        return shape_of(self[0])

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """The sum of kernels and of biases."""
        measured = [] if probe is None else [node for node in self if _is_measured(node)]
        if measured:
            _fold_inner(measured, dtype, probe)
        folded = [fold_node(node, dtype, probe) for node in self if node not in measured]
        if measured:
            folded.insert(0, _fold_measured(measured, self.shape[2:], dtype, probe))
        return self._add(folded)

    def _add(self, terms: Sequence[Affine]) -> Affine:
        weights, biases = zip(*terms, strict=True)
        weights = [centred(weight, self.shape[2:]) for weight in weights]
        biases = [bias for bias in biases if bias is not None]
        return sum(weights[1:], weights[0]), sum(biases[1:], biases[0]) if biases else None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Operations of all branches."""
        total, result = 0, size
        for index, (node, crop) in enumerate(zip(self, self._crops, strict=True)):
            macs, out = apply_macs(node, tuple(s - 2 * c for s, c in zip(size, crop, strict=True)))
            total += macs
            result = result if index else out
        return total, result

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Give the first branch what the others leave."""
        others = [fold_node(node, kernel.dtype) for node in list(self)[1:]]
        negative = [(-weight, None if bias is None else -bias) for weight, bias in others]
        set_kernel(self[0], *self._add([(kernel, bias), *negative]))

    def kernel_refusal(self) -> str:
        """The first branch's."""
        return kernel_refusal(self[0])


class PerChannel(Node):
    """What multiplies every output channel of a ``node`` by a number: its shape and costs."""

    @property
    def shape(self) -> Shape:
        """The node's."""
        return shape_of(self.node)

    def fold_macs(self) -> int:
        """One operation a value of the kernel."""
        out, inside, height, width = self.shape
        return out * inside * height * width + fold_macs(self.node)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """The node's and one operation an output."""
        macs, size = apply_macs(self.node, size)
        return macs + self.shape[0] * size[0] * size[1], size


class Scale(PerChannel):
    """A node times one factor per output channel.

    Args:
        node: what is scaled.
        start: the factors' first value.
    """

    def __init__(self, node: nn.Module, start: float):
        super().__init__()
        self.node = node
        out, like = shape_of(node)[0], next(chain(node.parameters(), node.buffers()))
        self.scale = nn.Parameter(torch.full((out,), start, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then scale."""
        y = self.node(x)
        return y * self.scale.view(-1, 1, 1)

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """Kernel and bias, scaled."""
        weight, bias = fold_node(self.node, dtype, probe)
        scale = self.scale.to(dtype)
        return weight * per_channel(scale, weight), None if bias is None else bias * scale

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Give the node what the present factors scale to this."""
        scale = self.scale.to(kernel.dtype)
        kernel = kernel / per_channel(scale, kernel)
        set_kernel(self.node, kernel, None if bias is None else bias / scale)

    def kernel_refusal(self) -> str:
        """The node's."""
        return kernel_refusal(self.node)


class Identity(Node):
    """The kernel that hands every input channel on; with a stride, every so many pixels.

    Args:
        conv: a 1x1 convolution of as many outputs as inputs: its stride and padding are taken.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding = conv.stride, conv.padding
        self.padding_needed = any(conv.padding)
        self.channels, self.per_group = conv.out_channels, conv.in_channels // conv.groups
        eye = torch.eye(self.per_group).repeat(self.channels // self.per_group, 1)
        # Known from the shapes: no part of a checkpoint.
        self.register_buffer('kernel', eye[:, :, None, None].to(conv.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The image, padded and strided."""
        (y, z), (down, right) = self.padding, self.stride
        x = F.pad(x, (z, z, y, y)) if self.padding_needed else x
        return x if (down, right) == (1, 1) else x[..., ::down, ::right]

    @property
    def shape(self) -> Shape:
        """1x1, from a group's inputs to all outputs."""
        return self.channels, self.per_group, 1, 1

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """Ones where an output stands for an input."""
        return self.kernel.to(dtype), None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Nothing is multiplied."""
        return 0, output_size(size, (1, 1), self.stride, self.padding, (1, 1))


class Filter(Node):
    """A 1x1 node, then a fixed filter of each of its channels (an average, a cosine).

    Args:
        node: of a 1x1 kernel.
        taps: ``(1 or out, kh, kw)``: one filter for all channels, or one for each.
        stride: of the filter.
        dilation: of the filter.
    """

    def __init__(
        self, node: nn.Module, taps: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
    ):
        super().__init__()
        self.node, self.stride, self.dilation = node, stride, dilation
        like = next(node.parameters())
        # Known from the shapes: no part of a checkpoint.
        taps = taps.to(like).expand(shape_of(node)[0], -1, -1)[:, None]
        self.register_buffer('taps', taps.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then the filter."""
        y = self.node(x)
        taps = self.taps.to(y.dtype)
        return F.conv2d(y, taps, None, self.stride, 0, self.dilation, groups=len(taps))

    @property
    def shape(self) -> Shape:
        """The node's channels, the filter's taps."""
        return (*shape_of(self.node)[:2], *self.taps.shape[2:])

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """Every value of the 1x1 kernel times its channel's filter."""
        weight, bias = fold_node(self.node, dtype, probe)
        taps = self.taps.to(dtype)
        return weight * taps, None if bias is None else bias * taps.sum((1, 2, 3))

    def fold_macs(self) -> int:
        """One operation a value of the kernel."""
        out, inside, height, width = self.shape
        return out * inside * height * width + fold_macs(self.node)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """The node's and the filter's."""
        macs, size = apply_macs(self.node, size)
        size = output_size(size, self.taps.shape[2:], self.stride, (0, 0), self.dilation)
        return macs + self.taps.numel() * size[0] * size[1], size


class Deviation(Node):
    """A convolution that is stored as its difference from a fixed kernel, and starts as that.

    Its weight is no ``nn.Conv2d``'s: a framework's initialisation would undo the start.

    Args:
        conv: whose shape, stride, padding and dilation are taken; it has no bias.
        base: the fixed kernel, of the shape of its weight.
    """

    def __init__(self, conv: nn.Conv2d, base: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(conv.weight))
        self.register_buffer('base', base.to(conv.weight), persistent=False)
        self._how = conv.stride, conv.padding, conv.dilation, conv.groups
        self._geometry = geometry(conv)

    def forward(self, x: Tensor) -> Tensor:
        """One convolution with the whole kernel."""
        return F.conv2d(x, self.weight + self.base, None, *self._how)

    @property
    def shape(self) -> Shape:
        """The weight's."""
        return tuple(self.weight.shape)

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """The whole kernel."""
        return self.weight.to(dtype) + self.base.to(dtype), None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Of one convolution."""
        size = output_size(size, *self._geometry)
        return self.weight.numel() * size[0] * size[1], size


class Separable(Node):
    """A depthwise node, then a 1x1 factor over all of its outputs (DO-Conv; OREPA's last branch).

    Args:
        depthwise: kernel ``(in * multiplier, 1, kh, kw)``, without bias.
        pointwise: kernel ``(out, in / groups * multiplier, 1, 1)``.
        multiplier: outputs of every input channel.
        groups: of the whole.
    """

    def __init__(self, depthwise: nn.Module, pointwise: nn.Conv2d, multiplier: int, groups: int):
        super().__init__()
        self.depthwise, self.pointwise = depthwise, pointwise
        self.multiplier, self.groups = multiplier, groups

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        return self.pointwise(self.depthwise(x))

    @property
    def shape(self) -> Shape:
        """The pointwise outputs, a group's inputs, the depthwise taps."""
        out, inside, *_ = shape_of(self.pointwise)
        return out, inside // self.multiplier, *shape_of(self.depthwise)[2:]

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """For every input, its filters weighted by what is made of them."""
        taps, _ = fold_node(self.depthwise, dtype, probe)
        weight, bias = fold_node(self.pointwise, dtype, probe)
        weight = weight.view(self.groups, -1, self.shape[1], self.multiplier)
        taps = taps.view(self.groups, self.shape[1], self.multiplier, *taps.shape[2:])
        return torch.einsum('gnme,gmehw->gnmhw', weight, taps).flatten(0, 1), bias

    def fold_macs(self) -> int:
        """Of that product."""
        out, inside, height, width = self.shape
        return out * inside * height * width * self.multiplier + fold_macs(self.depthwise)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Of both."""
        depthwise, size = apply_macs(self.depthwise, size)
        pointwise, size = apply_macs(self.pointwise, size)
        return depthwise + pointwise, size


class Norm(PerChannel):
    """A node, then batch normalisation: linear in eval mode only.

    In a layer without bias, which a norm follows as a rule, it must not shift: what centring
    takes away is given back from the running mean. The norm that follows removes any shift.

    Args:
        node: what is normalised; without bias.
        bias: whether the layer that is stood for has one.
        floored: whether a channel's variance counts as no less than ``FLOOR`` says.
    """

    def __init__(self, node: nn.Module, bias: bool, floored: bool = False):
        super().__init__()
        self.node = node
        like = next(chain(node.parameters(), node.buffers()))
        self.norm = nn.BatchNorm2d(shape_of(node)[0], device=like.device, dtype=like.dtype)
        self.shifts, self.floored = bias, floored
        self.norm.bias.requires_grad_(bias)
        self.anchoring = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then normalise; while ``anchoring``, anchor the norm instead."""
        if self.anchoring:
            return self._anchor(self.node(x))
        gain = self._gain(self.norm.weight.dtype)
        if not self.shifts:
            with torch.no_grad():
                self.norm.bias.copy_(self._scale(gain) * self.norm.running_mean)
        y = self.node(x)
        # By the norm's own class, which a framework may have replaced.
        return functional_call(self.norm, {'weight': gain}, (y,)) if self.floored else self.norm(y)

    def _gain(self, dtype: torch.dtype) -> Tensor:
        """The norm's weight, less where a channel's variance is below the floor."""
        gain = self.norm.weight.to(dtype)
        if not self.floored:
            return gain
        with torch.no_grad():
            inverse = excess(self.norm.running_var.to(dtype), self.norm.eps).rsqrt()
        return gain * inverse

    def _scale(self, gain: Tensor) -> Tensor:
        return gain * (self.norm.running_var.to(gain.dtype) + self.norm.eps).rsqrt()

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """Kernel and bias in eval mode by the running statistics, or by those of a probe."""
        if probe is not None and self in probe.folded:
            return probe.folded[self]
        if probe is not None and _is_measured(self):
            return _fold_measured([self], self.shape[2:], dtype, probe)
        weight, bias = fold_node(self.node, dtype, probe)
        scale, mean = self._scale(self._gain(dtype)), self.norm.running_mean.to(dtype)
        weight = weight * per_channel(scale, weight)
        if not self.shifts:
            return weight, None
        centre = -mean if bias is None else bias - mean
        return weight, self.norm.bias.to(dtype) + centre * scale

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Give the node this kernel; the norm takes the bias. See ``become_identity``."""
        set_kernel(self.node, kernel, None)
        if bias is not None:
            self.norm.bias.add_(bias)

    def kernel_refusal(self) -> str:
        """The node's."""
        return kernel_refusal(self.node)

    def become_identity(self) -> None:
        """Make the norm the identity in eval mode; in training mode it is one once anchored."""
        self.norm.reset_running_stats()
        self.norm.bias.zero_()
        self._undo_scale()

    def _undo_scale(self) -> None:
        self.norm.weight.fill_(1)
        self.norm.weight.copy_(1 / self._scale(self._gain(torch.float64)))

    def _anchor(self, y: Tensor) -> Tensor:
        """Take the statistics of outputs, leaving the norm the identity that it is.

        Gamma becomes the standard deviation and beta the mean (with the layer's bias), so that
        normalising these outputs by their own statistics gives them back.
        """
        shift = self.norm.bias - self.norm.running_mean
        mean, variance = _pooled_moments(y)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)
        self._undo_scale()
        self.norm.bias.copy_(mean + shift)
        return y + shift[:, None, None] if self.shifts else y


def _pooled_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of channels, over the batches of all processes."""
    wide = y.double()
    count = wide.new_tensor([y.numel() / y.shape[1]])
    sums = torch.cat((count, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    count, total, square = sums.split((1, y.shape[1], y.shape[1]))
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0)


def centred(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A kernel with zeros around it, up to this height and width."""
    y, x = margins(size, kernel.shape[2:])
    return F.pad(kernel, (x, x, y, y)) if y or x else kernel


def _is_measured(node: nn.Module) -> bool:
    return isinstance(node, Norm) and node.norm.training  # Not with a network's norm_eval.


def _fold_measured(
    branches: Sequence[Norm], size: Sequence[int], dtype: torch.dtype, probe: Probe
) -> Affine:
    """The sum of branches normalised by a probe's statistics, which the running ones follow.

    Args:
        branches: built for one layer.
        size: height and width of the sum.
        dtype: what to compute in.
        probe: of a batch.
    """
    folded = [fold_node(branch.node, dtype, probe) for branch in branches]
    kernels = [(centred(kernel, size), bias) for kernel, bias in folded]
    return _normalise(branches, kernels, len(branches), probe)


def _fold_inner(branches: Sequence[nn.Module], dtype: torch.dtype, probe: Probe) -> None:
    """Fold the norms inside of branches, where these are several, all at once for the probe."""
    norms = [
        node
        for branch in branches
        for node in branch.modules()
        if node is not branch and _is_measured(node)
    ]
    if len(norms) < 2:
        return
    folded = [fold_node(norm.node, dtype) for norm in norms]
    weights, biases = _normalise(norms, folded, 1, probe)
    sizes = [len(weight) for weight, _ in folded]
    weights = weights.split(sizes)
    biases = [None] * len(norms) if biases is None else biases.split(sizes)
    probe.folded.update(zip(norms, zip(weights, biases, strict=True), strict=True))


def _normalise(
    branches: Sequence[Norm], folded: Sequence[Affine], summed: int, probe: Probe
) -> Affine:
    """Normalise by a probe's statistics.

    Args:
        branches: with kernels of one size, built for one layer.
        folded: what their nodes fold to.
        summed: as of ``Normed``.
        probe: of a batch.
    """
    norms, dtype = [branch.norm for branch in branches], folded[0][0].dtype
    kernels, eps = [kernel for kernel, _ in folded], norms[0].eps
    variances = [norm.running_var for norm in norms]
    with torch.no_grad():
        if not branches[0].floored:
            floors = None
        elif summed == len(norms) > 1:  # All at once.
            floors = excess(torch.stack(variances).to(dtype), eps).view(-1)
        else:
            floors = join([excess(variance.to(dtype), eps) for variance in variances])
        taps = probe.taps(kernels[0].shape[2:], dtype)
    parameters = [norm.weight for norm in norms]
    if branches[0].shifts:
        parameters += [norm.bias for norm in norms]
    parameters = [parameter.to(dtype) for parameter in parameters]
    weight, bias, mean, variance = Normed.apply(
        taps, floors, eps, summed, len(norms), *kernels, *parameters
    )
    _follow(norms, mean, variance, [bias for _, bias in folded], probe.samples)
    return weight, bias


@torch.no_grad()
def _follow(
    norms: Sequence[nn.Module],
    mean: Tensor,
    variance: Tensor,
    biases: Sequence[Tensor | None],
    samples: int,
) -> None:
    """Let running statistics follow as ``F.batch_norm`` does, by the unbiased variance."""
    momentum = norms[0].momentum
    if momentum is None:  # A plain average over all batches.
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        momentum = 1 / norms[0].num_batches_tracked.item()
    sizes = [len(norm.running_mean) for norm in norms]
    unbiased = variance * (samples / max(1, samples - 1))
    means = [
        ours if bias is None else ours + bias
        for ours, bias in zip(part(mean, sizes), biases, strict=True)
    ]
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    new = [value.to(running[0].dtype) for value in (*means, *part(unbiased, sizes))]
    torch._foreach_lerp_(running, new, momentum)
