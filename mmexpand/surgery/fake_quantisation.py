"""Fake quantisation: a network computes in float what its int8 file computes.

Jacob et al., CVPR 2018. Kernels are symmetric with one scale for each output channel, activations
are unsigned with one scale. A unit has its folded kernel; a batch norm behind a layer is merged
into its kernel, and a ReLU behind it is part of the range of its output, as in the file.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core import ExpandedConv2d
from ..core.compat import version
from ..core.eligibility import class_refusal
from ..core.expanded_layer import ExpandedLayer
from ..core.names import check_choice
from .expand import names_of_units

INT8_KEY = 'mmexpand_int8'
"""Key of the trained ranges in a checkpoint's ``meta``: ``dict(target=..., ranges=...)``."""
TARGETS = {'x86': 64, 'x86-vnni': 127, 'arm': 127}
"""Processors, each with the largest weight: without VNNI, x86 adds products in 16 bits."""
LEVELS = 255
RECTIFIED = 'rectified'
"""Key of the range of a layer's output behind a ReLU."""
AVERAGED = 0.01
"""Smallest share of a step in the average of ranges, as in torch's observers."""


class FakeQuantisation:
    """Fake quantisation of the convolutions of a network.

    Until ``start``, forward passes are those of the float network, and are observed to find the
    norm behind each layer and the ranges of activations.

    Args:
        model: the network, which ``remove`` restores.
        target: processor that will run the file, a key of ``TARGETS``.

    Attributes:
        layers: fake-quantised layers, by each of their names.

    Raises:
        ValueError: if the target is unknown.
    """

    def __init__(self, model: nn.Module, target: str):
        check_choice('target', target, TARGETS)
        self.target = target
        names: dict[nn.Module, list[str]] = {}
        for name, module in _outside_units(model):
            if _is_convolution(module):
                names.setdefault(module, []).append(name)
        like = next(model.parameters())
        # Below and above zero, of every layer's input, output, and output behind a ReLU.
        self._mean = torch.zeros(3 * len(names), 2, device=like.device)
        self._seen = torch.zeros_like(self._mean)
        self._steps = torch.zeros(len(self._mean), 1, device=like.device)
        self._reaches = [Reach(*rows) for rows in zip(self._mean, self._seen, strict=True)]
        self.layers: dict[str, QuantisedLayer] = {}
        for index, module in enumerate(names):
            layer = QuantisedLayer(
                module, TARGETS[target], self._mean, *self._reaches[3 * index : 3 * index + 3]
            )
            self.layers.update(dict.fromkeys(names[module], layer))
        self._hooks = [
            module.register_forward_hook(_after_norm)
            for _, module in _outside_units(model)
            if isinstance(module, _BatchNorm) and module.running_var is not None
        ]
        for _, module in _outside_units(model):
            # In place: no other module reads the values before the ReLU.
            if isinstance(module, (nn.ReLU, nn.ReLU6)) and module.inplace:
                self._hooks.append(module.register_forward_pre_hook(_before_relu))
                self._hooks.append(module.register_forward_hook(_after_relu))

    def start(self, ranges: Mapping[str, Mapping[str, list[float]]] | None = None) -> None:
        """Quantise from now on.

        Layers that have not run or have several norms behind them are skipped.

        Args:
            ranges: result of ``ranges``; layers without an entry are skipped. None uses the
                observed ranges.
        """
        if ranges is not None:
            self._steps.fill_(1 / AVERAGED)
        for name, layer in [*self.layers.items()]:
            given = ranges is None or name in ranges
            if not given or not layer.runs or len(layer.norms) > 1:
                layer.remove()
                del self.layers[name]
                continue
            layer.start(None if ranges is None else ranges[name])
        self._find_known()

    def _find_known(self) -> None:
        """Note the layers with ranges: some see no data at first, as heads without proposals."""
        if not all(layer.output.known for layer in self.layers.values()):
            known = (self._steps.flatten() > 0).tolist()
            for reach, flag in zip(self._reaches, known, strict=True):
                reach.known = flag

    def observe(self, observes: bool) -> None:
        """Set whether forward passes are observed."""
        for layer in self.layers.values():
            layer.observes = observes

    def step(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Update the ranges with the values observed since the last step.

        Args:
            reduce: computes the maximum over processes, in place.
        """
        if reduce is not None:
            reduce(self._seen)
        share = (1 / (self._steps + 1)).clamp(min=AVERAGED)
        # An overflow in half precision skips the step, and must not change the ranges.
        usable = self._seen.any(1, keepdim=True) & self._seen.isfinite().all(1, keepdim=True)
        seen = torch.where(usable, self._seen, self._mean)
        self._mean.lerp_(seen, share.expand_as(seen))
        self._seen.zero_()
        self._steps += usable
        if any(layer.quantises for layer in self.layers.values()):
            self._find_known()

    def freeze_norms(self) -> None:
        """Keep the statistics of merged norms, so that training computes the deployed network."""
        for layer in self.layers.values():
            for norm in layer.norms:
                norm.eval()

    def ranges(self) -> dict[str, dict[str, list[float]]]:
        """Return the lowest and highest value of each layer's input and output, by layer name.

        The key of an output behind a ReLU is ``RECTIFIED``.
        """
        found = {}
        for name, layer in self.layers.items():
            if not layer.output.known:
                continue
            output = RECTIFIED if layer.is_rectified else 'output'
            reaches = {'input': layer.input.mean.tolist(), output: layer.output.mean.tolist()}
            found[name] = {key: [-below, above] for key, (below, above) in reaches.items()}
        return found

    def remove(self) -> None:
        """Restore the float network."""
        for hook in self._hooks:
            hook.remove()
        for layer in set(self.layers.values()):
            layer.remove()


@contextmanager
def fake_quantised(
    model: nn.Module,
    target: str,
    ranges: Mapping[str, Mapping[str, list[float]]],
    run: Callable[[], object],
) -> Iterator[None]:
    """Make a model compute what its int8 file computes, in this context.

    Args:
        model: a model in eval mode.
        target: a key of ``TARGETS``.
        ranges: result of ``FakeQuantisation.ranges``; other layers stay float.
        run: runs the model once.
    """
    fake = FakeQuantisation(model, target)
    try:
        run()
        fake.observe(False)
        fake.start(ranges)
        yield
    finally:
        fake.remove()


class Reach:
    """The range of an activation below and above zero.

    Args:
        mean: average over training steps, shape (2,).
        seen: maximum since the last step, shape (2,).

    Attributes:
        known: whether ``mean`` has values; False: activations stay float.
    """

    def __init__(self, mean: Tensor, seen: Tensor):
        self.mean, self.seen, self.known = mean, seen, False

    def observe(self, x: Tensor) -> None:
        """Extend ``seen`` by the values of an activation."""
        if x.numel():
            low, high = x.detach().float().aminmax()
            # A layer may give zeros only: they are a range too.
            seen = torch.stack([-low, high]).clamp_(min=torch.finfo(torch.float).tiny)
            torch.maximum(self.seen, seen, out=self.seen)

    def quantise(self, x: Tensor) -> Tensor:
        """Round an activation to 256 values, and note the step at the result."""
        # Step and zero point as ONNX Runtime computes them.
        step = (self.mean.sum().double() / LEVELS).float().clamp(min=torch.finfo(torch.float).tiny)
        zero = (self.mean[0] / step).round().int()
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), step, zero, 0, LEVELS)
        rounded = rounded.to(x.dtype)
        _note(rounded, 'step', step)
        return rounded


class QuantisedLayer:
    """A convolution with a rounded kernel and rounded activations.

    It replaces the layer's method that applies the kernel: copies of the layer have it too, and
    parameters, buffers and class of the layer stay the same.

    Args:
        layer: a convolution or its unit.
        limit: the largest weight.
        ranges: ranges of all layers.
        input: range of the input.
        output: range of the output, behind the norm if there is one.
        rectified: range of the output behind a ReLU.

    Attributes:
        norms: batch norms that have run behind the layer.
        runs: number of calls.
        is_rectified: whether ``output`` is the range behind a ReLU: one follows every call.
        observes: whether activations are observed.
        quantises: whether kernel and activations are rounded.
    """

    def __init__(
        self,
        layer: nn.Module,
        limit: int,
        ranges: Tensor,
        input: Reach,
        output: Reach,
        rectified: Reach,
    ):
        self.layer, self.limit, self.ranges = layer, limit, ranges
        self.input, self.output, self._rectified = input, output, rectified
        self.norms: list[_BatchNorm] = []
        self.runs = self._relus = 0
        self.is_rectified, self.observes, self.quantises = False, True, False
        unit = isinstance(layer, ExpandedLayer)
        self._method = '_apply_kernel' if unit else '_conv_forward'
        self._apply = getattr(layer, self._method)
        setattr(layer, self._method, self)
        if unit:
            self._forward_order, layer.forward_order = layer.forward_order, 'folded'

    def start(self, ranges: Mapping[str, list[float]] | None) -> None:
        """Quantise from now on, by given or by the observed ranges."""
        self.quantises = True
        self.is_rectified = self._relus == self.runs if ranges is None else RECTIFIED in ranges
        if self.is_rectified:
            self.output = self._rectified
        if ranges is not None:
            output = ranges[RECTIFIED if self.is_rectified else 'output']
            for reach, (low, high) in ((self.input, ranges['input']), (self.output, output)):
                reach.mean.copy_(torch.tensor([-low, high]))

    def remove(self) -> None:
        """Restore the layer's own method."""
        if vars(self.layer).pop(self._method, None) and isinstance(self.layer, ExpandedLayer):
            self.layer.forward_order = self._forward_order

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the rounded kernel to the rounded input."""
        self.runs += 1
        x = self._rounded_input(x)
        input_step = _noted(x, 'step')
        if self.quantises and input_step is not None:
            weight, bias = self._rounded_parameters(weight, bias, input_step)
        y = self._apply(x, weight, bias)
        if not self.norms and not self.is_rectified:
            y = self._rounded(y, self.output)
        _note(y, 'layer', self)
        return y

    def behind(self, norm: _BatchNorm, y: Tensor) -> Tensor:
        """Round the output of a norm behind the layer."""
        if norm not in self.norms:
            self.norms.append(norm)
            self.output.seen.zero_()  # It holds values of the layer's output before the norm.
        if not self.is_rectified:
            y = self._rounded(y, self.output)
        _note(y, 'normed', self)
        return y

    def behind_relu(self, y: Tensor) -> Tensor:
        """Round the output of a ReLU behind the layer."""
        self._relus += 1
        if self.is_rectified:
            return self._rounded(y, self.output)
        if self.observes:
            self._rectified.observe(y)
        return y

    def _rounded(self, x: Tensor, reach: Reach) -> Tensor:
        if self.observes:
            reach.observe(x)
        return reach.quantise(x) if self.quantises and reach.known else x

    def _rounded_input(self, x: Tensor) -> Tensor:
        """Round the input once, as the file does, even if several layers share it."""
        if _noted(x, 'step') is not None:
            return x
        rounded, ranges, state = _noted(x, 'rounded') or (x, None, 0)
        # An image may outlive the ranges that it was rounded by.
        if ranges is not self.ranges or state != version(ranges):
            rounded = self._rounded(x, self.input)
            if rounded is not x:
                _note(x, 'rounded', (rounded, self.ranges, version(self.ranges)))
        elif self.observes:
            self.input.observe(x)
        return rounded

    def _rounded_parameters(
        self, weight: Tensor, bias: Tensor | None, input_step: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Round the merged kernel and bias, and return the layer's own part of them."""
        scale, shift = weight.new_ones(len(weight)), weight.new_zeros(len(weight))
        for norm in self.norms:
            scale = scale / (norm.running_var + norm.eps).sqrt()
            if norm.affine:
                scale, shift = scale * norm.weight, norm.bias
            shift = shift - norm.running_mean * scale
        by_channel = scale.view(-1, 1, 1, 1)
        merged = weight.float() * by_channel
        largest = merged.detach().abs().amax((1, 2, 3))
        step = torch.where(largest > 0, largest / self.limit, 1)
        zero = torch.zeros_like(step, dtype=torch.int)
        rounded = torch.fake_quantize_per_channel_affine(
            merged, step, zero, 0, -self.limit, self.limit
        )
        divided = torch.where(by_channel == 0, 1, by_channel)
        weight = (rounded / divided).to(weight.dtype)
        if bias is None and not self.norms:
            return weight, None
        with torch.no_grad():
            # The file's biases are int32 multiples of the product of both steps.
            total = shift if bias is None else shift + bias * scale
            change = (total / (input_step * step)).round() * (input_step * step) - total
            change = (change / divided.flatten()).to(weight.dtype)
        return weight, change if bias is None else bias + change


def _after_norm(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    layer = _noted(args[0], 'layer')
    return output if layer is None else layer.behind(norm, output)


def _before_relu(relu: nn.Module, args: tuple[Tensor]) -> None:
    if not args:
        return
    layer = _noted(args[0], 'layer')
    behind_norm = _noted(args[0], 'normed')
    # Its forward pass changes the image in place, and removes the note.
    vars(relu)['mmexpand_layer'] = behind_norm if layer is None or layer.norms else layer


def _after_relu(relu: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    layer = vars(relu).pop('mmexpand_layer', None)
    return output if layer is None else layer.behind_relu(output)


def _note(x: Tensor, key: str, value: Any) -> None:
    """Attach a value to a tensor, valid until the tensor is changed in place."""
    setattr(x, f'_mmexpand_{key}', (version(x), value))


def _noted(x: Tensor, key: str) -> Any:
    noted_at, value = getattr(x, f'_mmexpand_{key}', (None, None))
    return value if noted_at == version(x) else None


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, ExpandedConv2d):
        return module.has_kernel
    # Activation checkpointing may have set another forward.
    return '_conv_forward' not in vars(module) and not class_refusal(module, nn.Conv2d)


def _outside_units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules outside units, under each of their names."""
    units = [f'{name}.' for names in names_of_units(model).values() for name in names]
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(tuple(units)):
            yield name, module
