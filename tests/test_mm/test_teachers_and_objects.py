"""mmdet's mean teachers, optimizer objects, and checkpoints that a model converts."""

import copy

import pytest
import torch
from mmdet.engine.hooks import MeanTeacherHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

import mmexpand
from mmexpand.mm import ContractHook, ExpandHook
from mmexpand.mm.checkpoints import check_shapes
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import CheckpointError


class Images(torch.utils.data.Dataset):
    metainfo: dict = {}

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=2 + 3 * torch.randn(3, 8, 8, generator=generator))


class Taught(BaseModel):
    """A student and its average, as mmdet's SemiBaseDetector."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, inputs, mode='tensor'):
        outputs = self.student(inputs)
        return dict(loss=outputs.square().mean()) if mode == 'loss' else outputs


class Two(BaseModel):
    """Two optimizers, one step of each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.b(self.a(inputs)).square().mean())

    def train_step(self, data, optim_wrapper):
        loss = self(**self.data_preprocessor(data, True))['loss']
        loss.backward()
        for wrapper in getattr(optim_wrapper, 'optim_wrappers', {'': optim_wrapper}).values():
            wrapper.step()
            wrapper.zero_grad()
        return dict(loss=loss)


def runner_of(model, tmp_path, *hooks, optim_wrapper=None):
    return Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=Images(),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=optim_wrapper or dict(optimizer=dict(type='SGD', lr=0.001)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=list(hooks),
        log_level='ERROR',
        experiment_name=tmp_path.name,
    )


@pytest.mark.parametrize(
    ('options', 'skip', 'words'),
    [
        (dict(method='cl', include='student'), True, 'is expanded in one of them only'),
        (dict(method='bn'), True, 'set skip_buffer=False of MeanTeacherHook'),
    ],
)
def test_a_mean_teacher_that_would_be_wrong_is_refused(tmp_path, options, skip, words):
    hooks = MeanTeacherHook(skip_buffer=skip), ExpandHook(rate=2, **options)
    with pytest.raises(ValueError, match=words):
        runner_of(Taught(), tmp_path, *hooks).train()


def test_a_mean_teacher_of_networks_that_are_expanded_already(tmp_path):
    model = Taught()
    mmexpand.expand_(model, method='bn')
    with pytest.raises(ValueError, match='set skip_buffer=False of MeanTeacherHook'):
        runner_of(model, tmp_path, MeanTeacherHook(), ContractHook()).train()


@pytest.mark.parametrize(('method', 'skip'), [('cl', True), ('bn', False)])
def test_a_mean_teacher_follows_its_student(tmp_path, method, skip):
    model = Taught()
    hooks = MeanTeacherHook(momentum=0.99, skip_buffer=skip), ExpandHook(method=method, rate=2)
    runner_of(model, tmp_path, *hooks).train()
    assert len(named_units(model)) == 4
    x = Images()[0]['inputs'][None]
    with torch.no_grad():
        student, teacher = model.eval().student(x), model.teacher(x)
    torch.testing.assert_close(teacher, student, rtol=0.1, atol=0.1 * float(student.std()))


@pytest.mark.parametrize('method', ['bn', 'repvgg'])
def test_a_mean_teacher_starts_as_the_given_network(tmp_path, method):
    """The first step anchors the student's norms, of which a teacher must not average a part."""
    model = Taught()
    given = copy.deepcopy(model.student).eval()
    optimizer = dict(optimizer=dict(type='SGD', lr=1e-9))
    hooks = MeanTeacherHook(momentum=0.1, skip_buffer=False), ExpandHook(method=method)
    runner_of(model, tmp_path, *hooks, optim_wrapper=optimizer).train()
    units = named_units(model.student), named_units(model.teacher)
    assert all(unit.is_anchored for part in units for unit in part.values())
    x = torch.stack([Images()[i]['inputs'] for i in range(16)])
    with torch.no_grad():
        expected = given(x)
        for network in (model.eval().student, model.teacher):
            assert float((network(x) - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize('several', [False, True])
def test_optimizer_objects_get_the_factors_and_clip_folded_gradients(tmp_path, several):
    model = Two()
    parts = (model.a, model.b) if several else (model,)
    wrappers = [
        OptimWrapper(torch.optim.SGD(part.parameters(), 0.01), clip_grad=dict(max_norm=1e-3))
        for part in parts
    ]
    optim = OptimWrapperDict(**dict(zip('ab', wrappers, strict=True))) if several else wrappers[0]
    runner_of(model, tmp_path, ExpandHook(method='cl', rate=2), optim_wrapper=optim).train()
    held = {id(p) for w in wrappers for g in w.optimizer.param_groups for p in g['params']}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(unit.kernel.gradient.enabled for unit in named_units(model).values())


class Resized(nn.Module):
    """It converts a table of another size while loading, as ViT does."""

    def __init__(self, size):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.table = nn.Parameter(torch.zeros(size))
        self._register_load_state_dict_pre_hook(self._resize)

    def _resize(self, state_dict, prefix, *_):
        key = f'{prefix}table'
        if key in state_dict:
            state_dict[key] = state_dict[key].mean().expand(len(self.table)).clone()


@pytest.mark.parametrize('expands', [False, True])
def test_a_checkpoint_that_the_model_converts_is_taken(expands):
    given = Resized(4).state_dict()
    model = Resized(6)
    if expands:
        mmexpand.expand_(model, method='cl', rate=2)
    check_shapes(model, dict(state_dict=given))
    given['conv.weight'] = torch.zeros(4, 3, 5, 5)
    with pytest.raises(CheckpointError, match=r'shape \(4, 3, 5, 5\)|has shape \(4,\)|lacks'):
        check_shapes(model, dict(state_dict=given))
    del given['conv.weight']
    with pytest.raises(CheckpointError, match='lacks 1 of the parameters'):
        check_shapes(model, dict(state_dict=given))
