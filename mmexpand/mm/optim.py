"""The optimizer of an expanded model, with options by layer and multipliers by factor role."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.optim import Optimizer

from ..core.expanded_layer import ExpandedLayer
from ..core.expression import ROLES, parameter_roles
from ..core.names import check_choice
from ..errors import UserValueError
from ..surgery import compact_looks, named_units
from .checkpoints import unwrap
from .clipping import clip_by_layer
from .wrapped_optimizers import built_again, keeps_own_groups

FACTOR_DECAYS = ('each', 'shared', 'product')
"""Values of ``factor_decay``."""

DECOUPLED = {'AdamW', 'Adafactor', 'Lion', 'Muon'}
"""Optimizers that decay the weights, not through the gradients."""

OPTIONS = {
    'factor_decay': 'each',
    'clip_factors': False,
    **{f'{role}_{what}_mult': 1.0 for role in ROLES for what in ('lr', 'decay')},
    'scale_decay_mult': 0.0,
}
"""Keys of ``paramwise_cfg`` that the base constructor does not know, with their defaults."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ExpandOptimWrapperConstructor:
    """An optimizer constructor that applies a compact parameter's options to its unit's parameters.

    A base constructor runs on the compact network, so that ``custom_keys``, multipliers of norms
    and depthwise layers and layer-wise decays see its names and layers. Every parameter of a unit
    then gets the options of its layer's weight or bias, times multipliers by role.

    Args:
        optim_wrapper_cfg: as for mmengine's default constructor.
        paramwise_cfg: the options of ``base_constructor``, and

            - base_constructor: the base constructor; mmengine's default.
            - outer_lr_mult, inner_lr_mult, scale_lr_mult, and outer_decay_mult, inner_decay_mult,
              scale_decay_mult: multipliers of learning rate and decay. Inner factors are the
              second factors of chains and kernels outside of chains; outer factors are the other
              factors of chains and the depthwise kernels of ``do`` and ``orepa``; scales include
              norms. Default 1; 0 for ``scale_decay_mult``.
            - factor_decay: 'each' (the layer's decay for each factor), 'shared' (the layer's decay
              divided by the number of factors, since all of them decay the product), or 'product'
              (half lambda times the squared norm of the folded kernel; Khodak et al., ICLR 2021).
            - clip_factors: whether ``clip_grad`` measures the gradients of factors. Default:
              gradients of the folded kernels, as in the compact network.

    Raises:
        ValueError: for an unknown ``factor_decay``, and for 'product' without folded kernels or
            with an optimizer whose decay is decoupled.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        options = dict(paramwise_cfg or {})
        self.base = options.pop('base_constructor', 'DefaultOptimWrapperConstructor')
        ours = {key: options.pop(key, value) for key, value in OPTIONS.items()}
        self.factor_decay = ours.pop('factor_decay')
        self.clip_factors = ours.pop('clip_factors')
        self.multipliers = ours
        check_choice('paramwise_cfg.factor_decay', self.factor_decay, FACTOR_DECAYS)
        self.options = options or None
        self.optim_wrapper_cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapper | OptimWrapperDict:
        """Build the optimizer wrapper of a model, expanded or not."""
        model = unwrap(model)
        optim_wrapper, names = self._build_compact(model)
        for wrapper in single_wrappers(optim_wrapper):
            self._hand_over(wrapper, names, model)
            if not self.clip_factors:
                clip_by_layer(wrapper, model)
        return optim_wrapper

    def compact_names(self, model: nn.Module) -> list[list[str]]:
        """Return the parameter names of the compact model's optimizer, by group.

        Args:
            model: the expanded model, unwrapped.
        """
        optim_wrapper, names = self._build_compact(model)
        groups = optim_wrapper.optimizer.param_groups
        return [[names[id(parameter)] for parameter in group['params']] for group in groups]

    def _build_compact(
        self, model: nn.Module
    ) -> tuple[OptimWrapper | OptimWrapperDict, dict[int, str]]:
        build = dict(
            type=self.base,
            optim_wrapper_cfg=copy.deepcopy(self.optim_wrapper_cfg),
            paramwise_cfg=self.options,
        )
        with compact_looks(model):
            optim_wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(build)(model)
            names = {id(parameter): name for name, parameter in model.named_parameters()}
        return optim_wrapper, names

    def _hand_over(self, wrapper: OptimWrapper, names: dict[int, str], model: nn.Module) -> None:
        """Give the compact network's optimizer the parameters of the expanded network."""
        if self.factor_decay == 'product':
            _check_product_decay(model)
            _check_coupled_decay(wrapper.optimizer)
        optimizer = wrapper.optimizer
        found = stand_ins(model)
        product_decays: dict[ExpandedLayer, float] = {}
        place = {id(parameter): index for index, parameter in enumerate(model.parameters())}
        for group in list(optimizer.param_groups):
            by_options: dict[tuple[float, float], list] = {}
            for parameter in group['params']:
                for part in found[names[id(parameter)]]:
                    by_options.setdefault(self._options(group, part), []).append(part.parameter)
                    if part.unit is not None and names[id(parameter)].endswith('.weight'):
                        product_decays[part.unit] = group.get('weight_decay', 0.0)
            base = {key: value for key, value in group.items() if key != 'params'}
            for index, (options, parameters) in enumerate(by_options.items()):
                parameters.sort(key=lambda parameter: place[id(parameter)])
                changed = dict(zip(('lr', 'weight_decay'), options, strict=True), params=parameters)
                if index == 0:
                    group.update(changed)
                else:
                    optimizer.add_param_group({**base, **changed})
        if keeps_own_groups(optimizer):
            wrapper.optimizer = optimizer = built_again(
                optimizer, self.optim_wrapper_cfg.get('optimizer')
            )
        if self.factor_decay == 'product':
            optimizer.register_step_pre_hook(lambda opt, *_: _decay_products(opt, product_decays))

    def _options(self, group: dict, part: '_Part') -> tuple[float, float]:
        """Return learning rate and decay of a parameter."""
        lr, decay = group['lr'], group.get('weight_decay', 0.0)
        if part.unit is None:
            return lr, decay
        share = dict(each=1.0, shared=1 / part.count, product=0.0)[self.factor_decay]
        return (
            lr * self.multipliers[f'{part.role}_lr_mult'],
            decay * share * self.multipliers[f'{part.role}_decay_mult'],
        )


def single_wrappers(wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    """Return the wrappers of single optimizers."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def by_layer(optim_wrapper: dict) -> dict:
    """Return an optimizer's config whose options per parameter apply to layers."""
    cfg = copy.deepcopy(optim_wrapper)
    name = ExpandOptimWrapperConstructor.__name__
    if cfg.get('constructor') not in (name, ExpandOptimWrapperConstructor):
        options = dict(cfg.get('paramwise_cfg') or {})
        if cfg.get('constructor') is not None:
            options['base_constructor'] = cfg['constructor']
        cfg.update(constructor=name, paramwise_cfg=options)
    return cfg


@dataclass(frozen=True)
class _Part:
    """A parameter of the model that stands for a compact parameter or a part of it."""

    parameter: nn.Parameter
    unit: ExpandedLayer | None = None
    role: str = ''
    count: int = 1


def stand_ins(model: nn.Module) -> dict[str, list[_Part]]:
    """Return the model's parameters by the name of the compact parameter they stand for."""
    units = named_units(model)
    parts: dict[str, list[_Part]] = {}
    for name, unit in units.items():
        roles = parameter_roles(unit.expression)
        for key, parameter in unit.expression.named_parameters():
            kind = 'bias' if key.endswith('bias') else 'weight'
            part = _Part(parameter, unit, roles[key], len(unit.factor_shapes))
            parts.setdefault(f'{name}.{kind}', []).append(part)
    inside = {id(part.parameter) for held in parts.values() for part in held}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            parts[name] = [_Part(parameter)]
    return parts


def _check_product_decay(model: nn.Module) -> None:
    for name, unit in named_units(model).items():
        if not unit.is_linear:
            raise UserValueError(
                f"factor_decay='product' requires a folded kernel, but {name} ({unit.method}) has "
                "none while training; use 'each' or 'shared'"
            )


def _check_coupled_decay(optimizer: Optimizer) -> None:
    decoupled = [group.get('decoupled_weight_decay') for group in optimizer.param_groups]
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if kinds & DECOUPLED or any(decoupled):
        raise UserValueError(
            "factor_decay='product' adds the decay to the gradients, but "
            f"{type(optimizer).__name__} decays the weights themselves; use 'each' or 'shared'"
        )


def _decay_products(optimizer: Optimizer, decays: Mapping[ExpandedLayer, float]) -> None:
    """Add the gradient of half the decay times the folded kernel's squared norm, for each unit.

    It is added once before a step, like an optimizer's own decay: independent of the number of
    calls of a layer, in the loss's scale, and on each rank.
    """
    # A fused optimizer divides gradients by the scale of mixed precision itself.
    scale = getattr(optimizer, 'grad_scale', None)
    for unit, decay in decays.items():
        factors = list(unit.expression.parameters())
        if not decay or all(p.grad is None for p in factors):
            continue
        decay *= 1 if scale is None else scale
        for parameter, gradient in unit.kernel.decay_gradients(decay).items():
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
