"""State dicts and files."""

import os
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.core.layer_spec import SPEC_KEY
from mmexpand.errors import UserError
from mmexpand.surgery.checkpoint import (
    WEIGHTS_ONLY,
    CheckpointError,
    contract_state_dict,
    expanded_layers,
    is_expanded_state_dict,
    load_checkpoint,
    save_checkpoint,
    save_safetensors,
)
from mmexpand.surgery.weights import load_own


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, groups=4, bias=False),
        nn.Conv2d(8, 4, 7, dilation=2),
        nn.Linear(4, 3),
        nn.ConvTranspose2d(4, 8, 5, 2, groups=2),
    ).double()


@pytest.mark.parametrize('method', ['cl', 'ck', 'auto', 'cl+fc', 'fc'])
@pytest.mark.parametrize('rate', [0.5, 4])
def test_contract_state_dict_needs_no_model(method, rate):
    expanded = net()
    mmexpand.expand_(expanded, ExpandConfig(method, rate, init='default'))
    state_dict = expanded.state_dict()
    assert is_expanded_state_dict(state_dict)
    compact = contract_state_dict(state_dict)
    assert not is_expanded_state_dict(compact)
    expected = mmexpand.contract(expanded).state_dict()
    assert list(compact) == list(expected)
    assert compact._metadata['0'] == expected._metadata['0']
    for name, value in expected.items():
        torch.testing.assert_close(compact[name], value, rtol=0, atol=1e-14)
    fresh = net()
    before = fresh[0].weight.clone(), fresh[4].weight.clone()
    fresh.load_state_dict(compact)
    after = fresh[0].weight, fresh[4].weight
    assert not all(map(torch.equal, before, after))
    assert list(contract_state_dict(compact)) == list(compact)


def test_layers_and_shapes_are_read_off():
    expanded = net()
    mmexpand.expand_(expanded, ExpandConfig(method='cl', rate=2, include='0'))
    shapes = expanded_layers(expanded.state_dict())
    assert list(shapes) == ['0']
    assert shapes['0'] == {
        'factors.0.weight': (6, 3, 1, 1),
        'factors.0.bias': (6,),
        'factors.1.weight': (16, 6, 3, 3),
        'factors.1.bias': (16,),
        'factors.2.weight': (8, 16, 1, 1),
        'factors.2.bias': (8,),
    }


def test_a_compact_state_dict_loads_into_an_expanded_model_and_back():
    compact, expanded = net(), net()
    mmexpand.expand_(expanded, ExpandConfig('cl+fc', 4))
    expanded.load_state_dict(compact.state_dict(), strict=True)
    back = mmexpand.contract(expanded).state_dict()
    for name, value in compact.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=1e-13)


def test_saving_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'net.pth'
    save_checkpoint(dict(state_dict=net().state_dict()), path)
    before = path.read_bytes()

    class Broken:
        def __reduce__(self):
            raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        save_checkpoint(dict(state_dict=Broken()), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['net.pth']
    assert list(load_checkpoint(path)['state_dict']) == list(net().state_dict())


@pytest.mark.parametrize('keep', [0, 10, 0.5])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / 'net.pth'
    save_checkpoint(net().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r'net\.pth.*truncated'):
        load_checkpoint(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match='no such checkpoint'):
        load_checkpoint(tmp_path / 'none.pth')
    torch.save(['a', 'list'], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='list, not a checkpoint'):
        load_checkpoint(tmp_path / 'list.pth')


def test_a_page_a_pickle_and_other_content_are_told_apart(tmp_path):
    (tmp_path / 'page.pth').write_text('\n<!DOCTYPE html><html>Not found</html>')
    with pytest.raises(CheckpointError, match=r'page\.pth is a web page.*download'):
        load_checkpoint(tmp_path / 'page.pth')
    (tmp_path / 'results.pkl').write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match=r'results\.pkl.*not a checkpoint'):
        load_checkpoint(tmp_path / 'results.pkl')
    torch.save(dict(model=net().state_dict(), epoch=1), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'holds no weights.*its keys are model, epoch'):
        load_checkpoint(tmp_path / 'other.pth')
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / 'script.pth'))
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='TorchScript'):
        load_checkpoint(tmp_path / 'script.pth')


def test_weights_are_read_where_torch_may_run_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv(WEIGHTS_ONLY, '1')
    save_checkpoint(dict(state_dict=net().state_dict()), tmp_path / 'net.pth')
    assert list(load_own(tmp_path / 'net.pth')['state_dict']) == list(net().state_dict())
    assert os.environ[WEIGHTS_ONLY] == '1'


def test_safetensors(tmp_path):
    path = tmp_path / 'net.safetensors'
    state_dict = net().state_dict()
    state_dict['tied'] = state_dict['0.weight']
    state_dict['strided'] = torch.arange(6.0).reshape(2, 3).t()
    save_safetensors(state_dict, path, dict(kind='compact', layers={'0': dict(rate=4)}))
    with safe_open(path, 'pt') as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(state_dict)
        assert all(torch.equal(file.get_tensor(key), state_dict[key]) for key in state_dict)
    assert metadata == dict(kind='compact', layers='{"0": {"rate": 4}}', format='pt')

    before = path.read_bytes()
    with pytest.raises(TypeError, match=r'extra is a .*tensors only'):
        save_safetensors(dict(extra='x'), path, {})
    with pytest.raises(CheckpointError, match=r'use the \.pth file'):
        load_checkpoint(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['net.safetensors']


def test_safetensors_are_whole_or_not_there(tmp_path, monkeypatch):
    def fails(tensors, filename, metadata):
        filename.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr('safetensors.torch.save_file', fails)
    with pytest.raises(OSError, match='disk full'):
        save_safetensors(net().state_dict(), tmp_path / 'net.safetensors', {})
    assert not os.listdir(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'pwned'),)

    torch.save(dict(state_dict=net().state_dict(), extra=Malicious()), tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match=r'bad\.pth holds a (posix|nt)\.mkdir'):
        load_checkpoint(tmp_path / 'bad.pth')
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('length', [8, 9])
def test_records_and_keys_of_former_versions_are_an_error(length):
    model = net()
    mmexpand.expand_(model, method='bn')
    former = model.state_dict()
    for key in [key for key in former if '.bn.' in key]:
        value = former.pop(key)
        if key.endswith(SPEC_KEY):
            former[key] = value[:length]
        else:
            former[key.replace('.bn.', '.bn.0.')] = value
    with pytest.raises(UserError, match='unsupported version of mmexpand; contract it with that'):
        contract_state_dict(former)
