"""Train small classifiers of a study side by side on one GPU, each step a CUDA graph.

Launching a step of SmallNet from Python takes ten times as long as the step: so one process records
the steps of many networks and replays them side by side. SGD, its schedule, ExpandHook and the
result files are those of `study.py`; other settings are unsupported. An epoch's last, smaller batch
is left out, and no training time is given. Arms of a fixed learning rate are trained first, then
the rates of the others, then their seeds.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mmexpand.errors import UserValueError
from mmexpand.mm.command_line import add_debug_argument, count, device, tool
from mmexpand.study.rates import final_runs, tuning_rounds, unfinished
from mmexpand.study.run import (
    LOSS_POINTS,
    arm_config,
    result_head,
    run_config,
    shares_images,
    versions,
    write_json,
)
from mmexpand.study.spec import Run, Study, load_study
from mmexpand.surgery import ExpandConfig, contract, expand_

WARM_UP = 3
"""Steps before a capture, which PyTorch requires."""

SGD_OPTIONS = {'lr', 'momentum', 'weight_decay'}

EVALUATED = 1000
"""Batch size of evaluations."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('study', help='study file path')
    parser.add_argument('--together', type=count, default=15, help='runs at a time')
    parser.add_argument(
        '--minutes', type=float, default=math.inf, help='skip the last runs that take longer'
    )
    parser.add_argument('--device', type=device, default='cuda', help='default: %(default)s')
    add_debug_argument(parser)
    return parser.parse_args()


def load_images(study: Study, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return images ``(N, 3, H, W)`` of uint8 and labels ``(N,)``, by split.

    Raises:
        ValueError: if arms have different images.
    """
    configs = [arm_config(arm) for arm in study.arms.values()]
    images = {}
    for split in ('train', 'val', 'test'):
        dataset, *others = (cfg[f'{split}_dataloader'].dataset for cfg in configs)
        if any(other != dataset for other in others):
            raise UserValueError(f'arms differ in {split}_dataloader.dataset: use study.py')
        data = list(DATASETS.build(dataset))
        stacked = (torch.stack([item[key] for item in data]) for key in ('inputs', 'labels'))
        images[split] = tuple(tensor.to(device) for tensor in stacked)
    return images


def learning_rates(cfg: Config, epochs: int, steps: int) -> list[float]:
    """Return the learning rate of every step, as a Runner's schedulers set it."""
    schedulers = json.dumps(list(cfg.get('param_scheduler') or []))
    return _learning_rates(schedulers, cfg.optim_wrapper.optimizer.lr, epochs, steps)


@cache
def _learning_rates(param_scheduler: str, lr: float, epochs: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    schedulers = []
    for fields in json.loads(param_scheduler):
        fields = dict(fields, optimizer=optimizer)
        if fields.pop('convert_to_iter_based', False):
            build = PARAM_SCHEDULERS.get(fields.pop('type')).build_iter_from_epoch
            schedulers.append(build(epoch_length=steps, **fields))
        else:
            schedulers.append(PARAM_SCHEDULERS.build(fields))
    rates = []
    for step in range(1, epochs * steps + 1):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or step % steps == 0:
                scheduler.step()
    return rates


def optimizer_options(cfg: Config) -> dict[str, float]:
    """Return learning rate, momentum and decay.

    Raises:
        ValueError: for settings that this tool does not support.
    """
    wrapper = dict(cfg.optim_wrapper)
    options = dict(wrapper.pop('optimizer'))
    plain = wrapper.pop('type', 'OptimWrapper') == 'OptimWrapper' and not wrapper
    if not plain or options.pop('type') != 'SGD' or set(options) - SGD_OPTIONS:
        raise UserValueError(
            'study_graphs.py trains with an optim_wrapper of SGD with lr, momentum and '
            'weight_decay, and nothing else in it: use study.py'
        )
    if cfg.get('load_from') or 'EpochBased' not in cfg.train_cfg.get('type', ''):
        raise UserValueError(
            'study_graphs.py trains from the start, in an EpochBasedTrainLoop: use study.py'
        )
    return options


def build_model(cfg: Config) -> nn.Module:
    """Return the network, expanded as its hook says."""
    model = MODELS.build(cfg.model)
    model.init_weights()
    for hook in cfg.get('custom_hooks') or []:
        fields = dict(hook)
        if fields.pop('type') != 'ExpandHook':
            raise UserValueError(f'{hook.type} is not ExpandHook; use study.py')
        expand_(model, ExpandConfig(**{'init': 'default', **fields}))
    return model


class Trainer:
    """One run: a network, its SGD, and the graph of its step.

    Args:
        study: the study.
        run: one of its runs.
        images: result of ``load_images``.
    """

    def __init__(self, study: Study, run: Run, images: dict[str, tuple[Tensor, Tensor]]):
        self.study, self.run, self._images = study, run, images
        cfg = self.cfg = run_config(study, run)
        options = optimizer_options(cfg)
        self._momentum, self._decay = options.get('momentum', 0), options.get('weight_decay', 0)
        inputs, labels = images['train']
        device, batch = inputs.device, cfg.train_dataloader.batch_size
        self.epochs, self.steps = cfg.train_cfg.max_epochs, len(inputs) // batch
        self.interval = cfg.train_cfg.val_interval
        rates = learning_rates(cfg, self.epochs, self.steps)
        self._preprocessor = MODELS.build(cfg.data_preprocessor).to(device)
        torch.manual_seed(run.seed)
        self.model = build_model(cfg).to(device).train()
        self._parameters = list(self.model.parameters())
        self._buffers = [torch.zeros_like(p) for p in self._parameters]
        # A graph has no arguments: it reads and writes these tensors.
        self._inputs = torch.zeros(self.steps, batch, *inputs.shape[1:], device=device)
        self._labels = labels.new_zeros(self.steps, batch)
        self._rates = torch.tensor(rates, device=device)
        self._in_epoch, self._step_number = (labels.new_zeros(1) for _ in range(2))
        self._loss = torch.zeros((), device=device)
        self.curve: list[list[float]] = []
        self.losses: list[list[float]] = []
        self.epoch = 0
        self._graph = None
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None

    def capture(self) -> None:
        """Record the step, and restore the state before it."""
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                self._step()
            self._clear_gradients()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        self._graph = graph
        self.model.load_state_dict(state)
        for tensor in (*self._buffers, self._in_epoch, self._step_number, self._loss):
            tensor.zero_()

    def begin_epoch(self) -> None:
        """Shuffle and augment the images, on another stream than the steps."""
        # Every arm sees a seed's images in the same order, independent of other runs.
        torch.manual_seed(self.run.seed * self.epochs + self.epoch)
        images, labels = self._images['train']
        order = torch.randperm(len(images), device=images.device)[: self._labels.numel()]
        data = dict(inputs=images[order], labels=labels[order])
        data = self._preprocessor(data, training=True)
        self._inputs.copy_(data['inputs'].view(self._inputs.shape))
        self._labels.copy_(data['labels'].view(self._labels.shape))
        self._in_epoch.zero_()

    def end_epoch(self) -> None:
        """Record the loss, and at some epochs the accuracy.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        self.epoch += 1
        self.synchronize()
        step, loss = self.epoch * self.steps, self._loss.item() / self.steps
        self._loss.zero_()
        if not math.isfinite(loss):
            raise FloatingPointError(f'the loss is {loss} at iteration {step}')
        if self.epoch % max(1, self.epochs // LOSS_POINTS) == 0:
            self.losses.append([step, round(loss, 5)])
        if self.epoch % self.interval == 0 or self.epoch == self.epochs:
            self.curve.append([step, self.accuracy('val')])

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.stream:
            torch.cuda.synchronize(self.stream.device)

    def step(self) -> None:
        """Run one training step; on a GPU do not wait for it."""
        with torch.cuda.stream(self.stream):
            if self._graph:
                self._graph.replay()
            else:
                self._step()

    def _step(self) -> None:
        """Run a step of ``torch.optim.SGD`` whose learning rate a graph can read."""
        self._clear_gradients()
        inputs, labels = (
            tensor.index_select(0, self._in_epoch)[0] for tensor in (self._inputs, self._labels)
        )
        loss = self.model(inputs, labels, mode='loss')['loss']
        loss.backward()
        gradients = [p.grad for p in self._parameters]
        with torch.no_grad():
            if self._decay:
                torch._foreach_add_(gradients, self._parameters, alpha=self._decay)
            torch._foreach_mul_(self._buffers, self._momentum)
            torch._foreach_add_(self._buffers, gradients)
            rate = self._rates.index_select(0, self._step_number)[0]
            torch._foreach_sub_(self._parameters, torch._foreach_mul(self._buffers, rate))
            self._loss += loss
            self._in_epoch += 1
            self._step_number += 1

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def accuracy(self, split: str) -> float:
        """Return the accuracy of the contracted network, in percent."""
        compact, right = contract(self.model).eval(), 0
        images, labels = self._images[split]
        for inputs, truth in zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True):
            data = self._preprocessor(dict(inputs=inputs, labels=truth))
            right += (compact(data['inputs']).argmax(1) == truth).sum().item()
        return round(100 * right / len(labels), 5)

    def result(self) -> dict:
        """Return the result in the form of ``study.py``."""
        name = self.study.metric
        return dict(
            result_head(self.study, self.run),
            status='ok',
            val={name: self.curve[-1][1]},
            test={name: self.accuracy('test')},
            curve=self.curve,
            loss=self.losses,
            seconds=None,
            steps=self.epochs * self.steps,
            parameters=sum(p.numel() for p in self._parameters),
            test_is_val=shares_images(self.cfg),
            versions=versions(),
        )


def train(trainers: list[Trainer], deadline: float, bar: Progress) -> None:
    """Train all side by side and write their results; skip the last that would be late."""
    epochs = max(trainer.epochs for trainer in trainers)
    task = bar.add_task(f'{len(trainers)} runs', total=epochs)
    study = trainers[0].study
    for epoch in range(epochs):
        started = time.monotonic()
        running = [trainer for trainer in trainers if trainer.epoch < trainer.epochs]
        for trainer in running:
            trainer.begin_epoch()
            trainer.synchronize()
        for step in range(max(trainer.steps for trainer in running)):
            for trainer in running:
                if step < trainer.steps:
                    trainer.step()
        for trainer in running:
            try:
                trainer.end_epoch()
            except FloatingPointError as error:
                head = result_head(study, trainer.run)
                result = dict(head, status='diverged', reason=str(error), loss=trainer.losses)
                write_json(result, study.result_path(trainer.run))
                trainers.remove(trainer)
        if 0 < epoch < epochs - 1:  # The first epoch includes one-time work.
            needed = (time.monotonic() - started) * (epochs - 1 - epoch)
            share = min(1, (deadline - time.monotonic()) / needed)
            for late in trainers[max(0, int(share * len(trainers))) :]:
                bar.console.print(f'{late.run}: skipped, the time is over')
                trainers.remove(late)
        if not trainers:
            break
        bar.update(task, completed=epoch + 1)
    for trainer in trainers:
        write_json(trainer.result(), study.result_path(trainer.run))
        bar.console.print(f'{trainer.run}: {trainer.curve[-1][1]:.2f} (val)')
    bar.remove_task(task)


def stages(study: Study) -> Iterator[list[Run]]:
    """Yield groups of runs: of fixed rates, of tuning, and at the best rates."""
    arms = list(study.arms.values())
    fixed = [run for arm in arms if arm.lr is not None for run in final_runs(study, arm)]
    yield sorted(fixed, key=lambda run: run.seed)
    yield from tuning_rounds(study, arms)
    yield sorted((run for arm in arms for run in final_runs(study, arm)), key=lambda r: r.seed)


def start(study: Study, runs: Sequence[Run], images: dict) -> list[Trainer]:
    """Return trainers, captured if a GPU is present."""
    trainers = [Trainer(study, run, images) for run in runs]
    for trainer in trainers:
        if trainer.stream:
            trainer.capture()
    return trainers


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    torch.backends.cudnn.benchmark = True
    study = load_study(args.study)
    deadline = time.monotonic() + 60 * args.minutes
    if args.device != 'cpu':
        torch.cuda.set_device(args.device)
    images = load_images(study, args.device)
    columns = TextColumn('{task.description}'), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as bar:
        for runs in stages(study):
            wanted = unfinished(study, runs)
            for first in range(0, len(wanted), args.together):
                train(start(study, wanted[first : first + args.together], images), deadline, bar)


if __name__ == '__main__':
    main()
