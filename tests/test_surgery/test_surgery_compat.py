"""The private parts of torch that surgery uses do what they are used for."""

import io
import zipfile

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmexpand.surgery import compat


def test_callbacks_run_in_order_when_a_backward_pass_ends():
    calls = []
    x = torch.ones(2, requires_grad=True)

    def queue(_):
        compat.call_after_backward(first)

    def first():
        calls.append(('first', x.grad is not None))
        compat.call_after_backward(lambda: calls.append(('second', x.grad is not None)))

    y = x * 2
    y.register_hook(queue)
    y.sum().backward()
    assert calls == [('first', True), ('second', True)]


def test_ddp_leaves_alone_what_is_ignored(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        compat.ignore(model, ['0.weight'])
        compat.ignore(model, ['0.bias'])
        assert compat.ignored(model) == ['0.weight', '0.bias']
        seen = seen_by_ddp(model)
        assert seen == {id(p) for p in model[1].parameters()}
        compat.ignore_no_more(model, {'0.weight': model[0].weight})
        assert compat.ignored(model) == ['0.bias']
        assert seen_by_ddp(model) == seen | {id(model[0].weight)}
    finally:
        torch.distributed.destroy_process_group()


def seen_by_ddp(model):
    wrapper = DistributedDataParallel(model)
    return {id(p) for p in wrapper._module_parameters}


def test_a_module_is_put_past_what_its_parent_does():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(2, 3)

        def __setattr__(self, name, value):
            assert name != 'part' or not hasattr(self, 'part')
            super().__setattr__(name, value)

    parent, new = Parent(), nn.Linear(2, 3)
    compat.put_module(parent, 'part', new)
    assert parent.part is new
    assert list(parent.children()) == [new]


def test_all_hooks_are_carried_over():
    calls = []
    old, new = nn.Linear(2, 3), nn.Linear(2, 3)
    old.register_forward_pre_hook(lambda *_: calls.append('before'))
    old.register_forward_hook(lambda *_, **__: calls.append('with names'), with_kwargs=True)
    old.register_full_backward_pre_hook(lambda *_: calls.append('back'))
    old.register_full_backward_hook(lambda *_: calls.append('backward'))
    compat.carry_over_hooks(old, new)
    new(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert calls == ['before', 'with names', 'back', 'backward']


def test_the_functions_that_build_tensors_are_those_of_a_checkpoint():
    file = io.BytesIO()
    torch.save(dict(a=torch.ones(2), b=nn.Parameter(torch.ones(2))), file)
    with zipfile.ZipFile(file) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith('data.pkl')]
        data = archive.read(name)
    for _, function in compat.REBUILD:
        assert function.encode() in data
