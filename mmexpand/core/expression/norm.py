"""Batch norms in branches, which use running statistics or the statistics of a batch sample."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..algebra import Affine
from ..batch_sample import BatchSample
from ..compat import add_to_all, lerp_all
from ..statistics import Covariance, Normed, Outputs, excess, join, part
from .node import PerChannel, centred, per_channel

CONSTANT = 1e-6
"""Variance of a constant image, as a fraction of its squared mean: rounding."""


class Norm(PerChannel):
    """A node, then batch normalisation; linear in eval mode only.

    A layer without bias cannot shift after contraction. Then the norm's bias cancels the centring,
    by the running mean. The norm that usually follows such a layer removes any shift.

    Args:
        node: the node to normalise.
        bias: whether the layer has a bias, so that the norm shifts.
        floored: whether a channel's variance has the floor ``FLOOR``.

    Attributes:
        anchoring: whether a forward pass anchors the norm instead of applying it.
        is_anchored: whether the statistics come from data; False after ``become_identity``.
        is_frozen: whether training mode keeps the statistics too.
    """

    def __init__(self, node: nn.Module, bias: bool, floored: bool = False):
        super().__init__()
        self.node = node
        like = next(chain(node.parameters(), node.buffers()))
        self.norm = nn.BatchNorm2d(node.shape[0], device=like.device, dtype=like.dtype)
        self.shifts, self.floored = bias, floored
        self.norm.bias.requires_grad_(bias)
        self.anchoring, self.is_anchored, self.is_frozen = False, True, False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then normalise; anchor the norm instead if ``anchoring``."""
        if self.anchoring:
            return self._anchor(self.node(x))
        y = self.node(x)
        if self.shifts and not self.floored:
            return self.norm(y)
        gain, bias = self._gain(self.norm.weight.dtype), self.norm.bias
        if not self.shifts:
            bias = (self._scale(gain) * self.norm.running_mean).detach()
        # Call the norm's own class, which a framework may have replaced.
        return functional_call(self.norm, {'weight': gain, 'bias': bias}, (y,))

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode; a frozen norm stays in eval mode.

        So does the norm of a frozen layer, which statistics of the batch would change.
        """
        super().train(mode)
        if self.is_frozen or not self.norm.weight.requires_grad:
            self.norm.eval()
        return self

    def _gain(self, dtype: torch.dtype) -> Tensor:
        """Return the norm's weight, reduced where a channel's variance is below the floor."""
        gain = self.norm.weight.to(dtype)
        if not self.floored:
            return gain
        with torch.no_grad():
            inverse = excess(self.norm.running_var.to(dtype), self.norm.eps).rsqrt()
        return gain * inverse

    def _scale(self, gain: Tensor) -> Tensor:
        return gain * (self.norm.running_var.to(gain.dtype) + self.norm.eps).rsqrt()

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return kernel and bias by running statistics, or by a sample's in training mode."""
        if sample is not None and self in sample.folded:
            return sample.folded[self]
        if sample is not None and self.anchoring:
            return self._anchor_folded(*self.node.fold(dtype, sample), sample)
        if sample is not None and is_measured(self):
            return fold_measured([self], self.shape[2:], dtype, sample)
        weight, bias = self.node.fold(dtype, sample)
        scale, mean = self._scale(self._gain(dtype)), self.norm.running_mean.to(dtype)
        weight = weight * per_channel(scale, weight)
        if not self.shifts:
            return weight, None
        centre = -mean if bias is None else bias - mean
        return weight, self.norm.bias.to(dtype) + centre * scale

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Set the node's kernel, and add the bias to the norm's; call ``become_identity`` first."""
        self.node.set_kernel(kernel, None)
        if bias is not None:
            self.norm.bias.add_(bias)

    def add_bias(self, shift: Tensor) -> None:
        """Shift the norm's bias."""
        self.norm.bias.add_(shift)

    def become_identity(self) -> None:
        """Make the norm an identity in eval mode; anchoring makes it one in training mode too."""
        self.is_anchored = False
        self.norm.reset_running_stats()
        self.norm.bias.zero_()
        self._set_scale(1)

    def _set_scale(self, scale: Tensor | float) -> None:
        self.norm.weight.fill_(1)
        self.norm.weight.copy_(scale / self._scale(self._gain(torch.float64)))

    def _anchor(self, y: Tensor) -> Tensor:
        """Anchor the norm at the statistics of outputs ``(N, channels, H, W)``.

        The norm of a given layer is an identity: gamma becomes the standard deviation and beta the
        mean (plus the layer's bias), so that normalising these outputs by their own statistics
        returns them.
        """
        samples = y.numel() // y.shape[1]
        if samples:
            variance, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        else:
            variance = mean = y.new_zeros(y.shape[1], dtype=torch.float64)
        scale, shift = (t[:, None, None] for t in self._anchor_at(mean, variance, samples))
        return torch.addcmul(shift, y, scale) if self.shifts else y * scale

    def _anchor_folded(self, weight: Tensor, bias: Tensor | None, sample: BatchSample) -> Affine:
        """Anchor as ``_anchor`` does, at the statistics of a sample; return kernel and bias."""
        kernel = weight if weight.shape[2:] == (1, 1) else centred(weight, sample.kernel_size)
        taps = sample.taps(kernel.shape[2:], torch.float64)
        measure = Outputs if taps.dim() == 2 else Covariance
        moments = measure(taps, kernel.double().flatten(1), [len(kernel)])
        mean = moments.mean if bias is None else moments.mean + bias
        scale, shift = self._anchor_at(mean, moments.variance, sample.samples)
        weight = weight * per_channel(scale, weight)
        if not self.shifts:
            return weight, None if bias is None else bias * scale
        return weight, shift if bias is None else torch.addcmul(shift, bias, scale)

    def _anchor_at(self, mean: Tensor, variance: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Set statistics, gamma and beta; return the scale and shift that the norm has."""
        dtype = self.norm.weight.dtype
        scale = self._scale(self._gain(torch.float64))
        shift = self.norm.bias - self.norm.running_mean * scale
        kept = scale.to(dtype), shift.to(dtype)
        samples, mean, variance = _pooled(mean, variance, samples)
        # A constant image, apart from rounding: wait for data.
        if not samples or not (variance > CONSTANT * mean.square()).any():
            return kept
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)
        self._set_scale(scale)
        self.norm.bias.copy_(mean * scale + shift)
        self.is_anchored = True
        return kept


def _pooled(mean: Tensor, variance: Tensor, samples: int) -> tuple[int, Tensor, Tensor]:
    """Return samples, mean and biased variance of channels, over the batches of all processes.

    All processes call it, also with an empty batch: the others would wait.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return samples, mean, variance
    sums = samples * torch.stack((torch.ones_like(mean), mean, variance + mean.square()))
    torch.distributed.all_reduce(sums)
    count, total, square = sums
    mean = total / count.clamp_min(1)
    variance = (square / count.clamp_min(1) - mean.square()).clamp_min(0)
    return int(count[0]), mean, variance


def has_statistics(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """Return whether the statistics of a norm in a state dict differ from those of a new norm."""
    mean, variance = (state_dict[f'{prefix}running_{kind}'] for kind in ('mean', 'var'))
    return mean.is_meta or bool(mean.any() or (variance != 1).any())


def is_measured(node: nn.Module) -> bool:
    """Return whether a node is a norm that takes statistics of the batch."""
    # A network's norm_eval puts norms in eval mode.
    return isinstance(node, Norm) and node.norm.training and not node.anchoring


def alike(norms: Sequence[Norm]) -> bool:
    """Return whether norms have the same options, so that they can be folded in one operation."""
    return len({(norm.floored, norm.shifts, norm.norm.eps) for norm in norms}) <= 1


def fold_measured(
    branches: Sequence[Norm], size: Sequence[int], dtype: torch.dtype, sample: BatchSample
) -> Affine:
    """Return the summed kernel and bias of branches, normalised by a sample's statistics.

    This updates the running statistics.

    Args:
        branches: the norms of one layer.
        size: height and width of the summed kernel.
        dtype: the dtype of the computation.
        sample: the batch sample.
    """
    folded = [branch.node.fold(dtype, sample) for branch in branches]
    kernels = [(centred(kernel, size), bias) for kernel, bias in folded]
    return _normalise(branches, kernels, len(branches), sample)


def fold_inner(branches: Sequence[nn.Module], dtype: torch.dtype, sample: BatchSample) -> None:
    """Fold the norms inside of branches in one operation, if a layer has several of them."""
    norms = [
        node
        for branch in branches
        for node in branch.modules()
        if node is not branch and is_measured(node)
    ]
    if len(norms) < 2 or not alike(norms) or len({norm.shape[1:] for norm in norms}) > 1:
        return  # Each is folded by itself.
    if any(is_measured(m) for norm in norms for m in norm.modules() if m is not norm):
        return  # So are norms around norms.
    folded = [norm.node.fold(dtype) for norm in norms]
    weights, biases = _normalise(norms, folded, 1, sample)
    sizes = [len(weight) for weight, _ in folded]
    weights = weights.split(sizes)
    biases = [None] * len(norms) if biases is None else biases.split(sizes)
    sample.folded.update(zip(norms, zip(weights, biases, strict=True), strict=True))


def _normalise(
    branches: Sequence[Norm], folded: Sequence[Affine], summed: int, sample: BatchSample
) -> Affine:
    """Normalise by a sample's statistics, and update the running statistics.

    Args:
        branches: norms of one layer with kernels of one size.
        folded: the kernels and biases of their nodes.
        summed: as in ``Normed``.
        sample: the batch sample.
    """
    norms, dtype = [branch.norm for branch in branches], folded[0][0].dtype
    kernels, eps = [kernel for kernel, _ in folded], norms[0].eps
    variances = [norm.running_var for norm in norms]
    with torch.no_grad():
        if not branches[0].floored:
            floors = None
        elif summed == len(norms) > 1:  # All norms have the same number of channels.
            floors = excess(torch.stack(variances).to(dtype), eps).view(-1)
        else:
            floors = join([excess(variance.to(dtype), eps) for variance in variances])
        taps = sample.taps(kernels[0].shape[2:], dtype)
    parameters = [norm.weight for norm in norms]
    if branches[0].shifts:
        parameters += [norm.bias for norm in norms]
    parameters = [parameter.to(dtype) for parameter in parameters]
    weight, bias, mean, variance = Normed.apply(
        taps, floors, eps, summed, len(norms), *kernels, *parameters
    )
    _follow(norms, mean, variance, [bias for _, bias in folded], sample.samples)
    return weight, bias


@torch.no_grad()
def _follow(
    norms: Sequence[nn.Module],
    mean: Tensor,
    variance: Tensor,
    biases: Sequence[Tensor | None],
    samples: int,
) -> None:
    """Update running statistics as ``F.batch_norm`` does, with the unbiased variance."""
    momentum = norms[0].momentum
    if momentum is None:  # A plain average over all batches.
        add_to_all([norm.num_batches_tracked for norm in norms], 1)
        momentum = 1 / norms[0].num_batches_tracked.item()
    sizes = [len(norm.running_mean) for norm in norms]
    unbiased = variance * (samples / max(1, samples - 1))
    means = [
        ours if bias is None else ours + bias
        for ours, bias in zip(part(mean, sizes), biases, strict=True)
    ]
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    new = [value.to(running[0].dtype) for value in (*means, *part(unbiased, sizes))]
    lerp_all(running, new, momentum)
