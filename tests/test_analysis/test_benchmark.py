import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import mmexpand
from mmexpand.analysis import benchmark
from mmexpand.analysis.bounds import MachineRates, counted_step, folding_bound, folding_macs
from mmexpand.analysis.cases import PEERS, Case, run_model
from mmexpand.analysis.complexity import layer_costs
from mmexpand.analysis.footprint import (
    OutOfMemoryError,
    peak_memory,
    reduced_bytes,
    saved_bytes,
)
from mmexpand.analysis.steps import (
    Settings,
    StepTimes,
    Trainer,
    make_optimizer,
    time_in_turns,
)

TOOLS = Path(__file__).parents[2] / 'tools/analysis_tools'
CONFIGS = Path(__file__).parents[2] / 'configs'

# The first convolution of small_model at r = 2: factors of 3-6-8-4 channels.
COMPACT_PARAMETERS = 4 * 3 * 9 + 4 * 2
FACTOR_PARAMETERS = 3 * 6 + 6 * 8 * 9 + 8 * 4
CHEAPEST_PRODUCT = 8 * 3 * 6 * 9 + 4 * 3 * 8 * 9
IMAGES = (2, 3, 8, 8)


def small_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)
    )


def small_expanded(forward):
    model = small_model()
    mmexpand.expand_(
        model, mmexpand.ExpandConfig(method='cl', rate=2, include='0', forward=forward)
    )
    return model


def small_case(**changes):
    expansions = (('', mmexpand.ExpandConfig(method='cl', include='0')),)
    case = Case('small', small_model, IMAGES, expansions, peers=('RepVGG',), counted_shape=IMAGES)
    return replace(case, **changes)


# -- bytes ----------------------------------------------------------------------------------------


def count_saved(model):
    return saved_bytes(model, torch.randn(IMAGES), run_model)[0]


# The input and what ReLU returns, which the second convolution saves as well: once.
SMALL_ACTIVATIONS = 4 * (2 * 3 * 64 + 2 * 4 * 64)


def test_saved_bytes_of_a_compact_model():
    saved = count_saved(small_model())
    assert saved.activations == SMALL_ACTIVATIONS
    assert saved.folding == 0


def test_saved_bytes_of_a_folded_model():
    saved = count_saved(small_expanded('folded'))
    assert saved.activations == SMALL_ACTIVATIONS
    assert saved.folding == 4 * 4 * 3 * 9  # The folded kernel.


def test_saved_bytes_of_the_chain():
    saved = count_saved(small_expanded('layerwise'))
    # The first factor pads: 10x10 pixels.
    assert saved.activations == SMALL_ACTIVATIONS + 4 * (2 * 6 * 100 + 2 * 8 * 64)


def test_saved_bytes_are_told_apart_by_where_they_come_from():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.ones(2, 8))

        def forward(self, x):
            return x @ (self.a @ self.b).exp()

    saved, output = saved_bytes(Product(), torch.ones(5, 8), run_model)
    assert (saved.activations, saved.folding) == (4 * 5 * 8, 4 * 8 * 8)
    assert output.requires_grad


def test_counting_saved_bytes_leaves_nothing_behind():
    alive = []

    class Watched(nn.ReLU):
        def forward(self, x):
            output = super().forward(x)
            alive.append(StorageWeakRef(output.untyped_storage()))
            return output

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Watched())
    saved_bytes(model, torch.randn(IMAGES), run_model)
    assert alive[0].expired()


def test_reduced_bytes():
    compact, expanded = small_model(), small_expanded('folded')
    assert reduced_bytes(compact, compact, ()).ddp == 4 * COMPACT_PARAMETERS
    folded = reduced_bytes(expanded, compact, ['0'])
    assert folded.ddp == 4 * (FACTOR_PARAMETERS + 4 * 2)
    assert folded.compact_size == 4 * COMPACT_PARAMETERS
    chain = reduced_bytes(expanded, compact, ())
    assert chain.compact_size == chain.ddp == folded.ddp
    for model in (compact, expanded):
        model[2].requires_grad_(False)
    assert reduced_bytes(expanded, compact, ['0']).compact_size == 4 * 4 * 3 * 9


def hold(size):
    torch.ones(size // 4)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_peak_memory():
    size = 2**27
    # The kernel counts resident pages by the batch: a few may be missing.
    assert 0.99 * size <= peak_memory(hold, size, threads=1) < 1.2 * size
    with pytest.raises(OutOfMemoryError, match='memory'):
        peak_memory(die, threads=1)


# -- bounds ---------------------------------------------------------------------------------------


def test_folding_bound():
    compact, expanded = small_model(), small_expanded('folded')
    assert folding_macs(compact) == 0
    assert folding_macs(expanded) == CHEAPEST_PRODUCT
    bound = folding_bound(expanded, compact, 2.0, MachineRates(gemm=1e4, bandwidth=1e4))
    products = 3 * 2 * CHEAPEST_PRODUCT / 1e4
    traffic = 6 * 4 * (FACTOR_PARAMETERS - 4 * 3 * 9) / 1e4
    assert bound.ratio == pytest.approx((2 + products + traffic) / 2, rel=1e-12)


def test_counted_step():
    counted = counted_step(small_expanded('folded'), small_model(), IMAGES, run_model)
    pixels = 2 * 64
    assert counted.compact == pixels * COMPACT_PARAMETERS
    assert counted.folded == counted.compact + CHEAPEST_PRODUCT
    chain = 2 * 100 * 3 * 6 + pixels * (6 * 8 * 9 + 8 * 4)
    assert counted.layerwise == chain + pixels * 4 * 2
    assert counted.auto == min(counted.folded, counted.auto) < counted.layerwise
    assert counted.ratio('folded') == counted.folded / counted.compact


# -- steps ----------------------------------------------------------------------------------------


def test_slow_models_do_fewer_steps_in_turns():
    calls = []

    def step(name, seconds):
        return lambda: calls.append(name) or StepTimes(0.0, seconds, 0.0)

    steps = {'slow': step('slow', 1.0), 'fast': step('fast', 0.1), 'same': step('same', 0.1)}
    done = []
    times = time_in_turns(
        steps, Settings(steps=12, warmup=2, budget=4), lambda *args: done.append(args[1:])
    )
    assert {name: len(values) for name, values in times.items()} == dict(slow=4, fast=12, same=12)
    assert done == [(i, 28) for i in range(28)]
    timed = calls[-28:]
    # Every third round has a slow step, and no model does two rounds' steps in one.
    rounds = [timed[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(r) == ['fast'] * 3 + ['same'] * 3 + ['slow'] for r in rounds)
    # The order within a round changes.
    assert {'fast', 'same'} <= {timed[0], timed[2], timed[4], timed[7], timed[9], timed[11]}


@pytest.mark.parametrize(
    'change', [dict(steps=1), dict(warmup=0), dict(threads=0), dict(optimizer='adam')]
)
def test_settings_that_mean_nothing_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings(**change)


# -- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('peer', PEERS)
def test_peers_stand_for_the_layers_that_are_expanded(peer):
    case = Case('small', lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), (1, 4, 8, 8), peers=(peer,))
    unit = case.build_variant(peer, 2)[0]
    assert unit.method == PEERS[peer]['method']
    assert case.build_variant('folded', 2)[0].method == 'cl'


def test_mixed_precision_is_that_of_the_forward():
    seen = []

    def forward(model, images):
        seen.append(model(images))
        return seen[-1]

    model = nn.Conv2d(3, 4, 3)
    before = model.weight.detach().clone()
    images = torch.randn(1, 3, 8, 8)
    for amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        Trainer(model, make_optimizer(model, 'fused'), images, forward, amp).step()
        assert seen.pop().dtype == dtype
        assert model.weight.dtype == torch.float32
        assert not torch.equal(model.weight, before)


# -- from end to end ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def group():
    return benchmark.run_group(small_case(), 2, Settings(steps=4, warmup=1, budget=60, threads=1))


def test_group(group):
    assert list(group.variants) == ['compact', 'layerwise', 'folded', 'auto', 'RepVGG']
    assert not group.left_out
    compact = group.variants['compact']
    assert (compact.ratio.min, compact.ratio.median) == (1, 1)
    assert compact.footprint.difference is None
    for result in group.variants.values():
        assert result.steps == 4
        assert 0 < result.step.min <= result.step.median
        parts = result.forward.min + result.backward.min + result.optimizer.min
        assert parts <= result.step.min * (1 + 1e-9)
        assert result.ratio.min == result.step.min / compact.step.min
        assert result.footprint.peak_memory > 0
    chain, folded = group.variants['layerwise'].footprint, group.variants['folded'].footprint
    assert chain.saved.activations > folded.saved.activations == SMALL_ACTIVATIONS
    assert chain.reduced.compact_size > folded.reduced.compact_size == 4 * COMPACT_PARAMETERS
    assert chain.difference == 0 < folded.difference < 1e-5
    assert group.bound.compact == compact.step.min
    assert group.bound.ratio > 1
    assert group.counted.input_shape == IMAGES


def test_a_wrong_computation_is_not_timed():
    outputs = [torch.ones(2)], [torch.full((2,), 1.1)]
    with pytest.raises(RuntimeError, match=r'small, folded: .* differ by 0\.0909'):
        benchmark._difference(*outputs, 'small, folded')


def test_variants_that_do_not_fit_are_left_out(monkeypatch):
    def peak(train, case, name, *args, threads, device):
        if name in ('layerwise', 'folded'):
            raise OutOfMemoryError('no memory')
        return 1

    monkeypatch.setattr(benchmark, 'peak_memory', peak)
    group = benchmark.run_group(small_case(peers=()), 2, Settings(steps=3, warmup=1, threads=1))
    assert list(group.variants) == ['compact', 'auto']
    assert group.left_out == dict(layerwise='no memory', folded='no memory')
    assert group.bound is None


@pytest.fixture
def tool(monkeypatch):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    monkeypatch.syspath_prepend(str(TOOLS))
    yield
    for name in ('benchmark_cases', 'benchmark_report', 'benchmark_training'):
        sys.modules.pop(name, None)


def test_report(tool, group, tmp_path):
    import benchmark_report

    left_out = replace(
        group, case='large', rate=4, bound=None, counted=None, left_out=dict(folded='no memory')
    )
    del (variants := dict(group.variants))['folded']
    groups = [group, replace(left_out, variants=variants)]
    benchmark_report.write_report(tmp_path, benchmark_report.machine(), Settings(), groups)
    assert {path.name for path in tmp_path.iterdir()} == {
        'benchmark.json',
        'benchmark.md',
        'benchmark.png',
    }
    record = json.loads((tmp_path / 'benchmark.json').read_text())
    assert record['settings']['optimizer'] == 'fused'
    first, second = record['groups']
    assert (first['case'], first['rate'], first['input_shape']) == ('small', 2, list(IMAGES))
    folded = first['variants']['folded']
    assert folded['ratio']['min'] == folded['step']['min'] / first['bound']['compact']
    assert folded['footprint']['saved']['activations'] == SMALL_ACTIVATIONS
    measured_to_bound = folded['ratio']['min'] / first['bound']['ratio']
    assert first['bound']['measured_to_bound'] == measured_to_bound
    assert first['counted']['ratios']['folded'] == group.counted.ratio('folded')
    assert second['left_out'] == dict(folded='no memory')
    text = (tmp_path / 'benchmark.md').read_text()
    tables = [block for block in text.split('\n\n') if block.startswith('|')]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count('|') for line in table.splitlines()}) == 1
    assert f'{group.variants["folded"].ratio.min:.2f}' in tables[0]
    assert 'left out' in tables[0]


def test_terminal_table(tool, group):
    import benchmark_report
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, 'w'))  # noqa: SIM115
    console.print(benchmark_report.group_table(group))
    text = console.export_text()
    assert 'small, r = 2, input 2x3x8x8' in text
    assert f'Bound of folded: {group.bound.ratio:.3f}' in text


def test_built_in_cases_expand_what_they_say(tool):
    from benchmark_cases import BUILT_IN

    expanded = {}
    for name, case in BUILT_IN.items():
        with torch.device('meta'):
            expanded[name] = mmexpand.plan(case.build(), case.expansions[0][1])
    counts = {name: len(plan) for name, plan in expanded.items()}
    encoder = 10
    assert counts == {
        'yolo-lite': 5,
        'unet-16': encoder,
        'unet-32': encoder,
        'unet-64': encoder,
        'mobilenetv2': 17,
    }
    shapes = [layer.factor_shapes for layer in expanded['mobilenetv2']]
    assert all(inside == 1 for (_, inside, *_), *_ in shapes)


def test_case_of_a_config(tool):
    from benchmark_cases import config_case
    from mmengine.config import Config

    folder = CONFIGS / 'yolo_lite'
    name = 'yolo-lite_expand-cl-r4_1xb64-600k_voc0712-224x224'
    case = config_case(f'{name}.py', Config.fromfile(folder / f'{name}.py'), 2, (64, 96))
    assert (case.name, case.input_shape) == (name, (2, 3, 64, 96))
    model = case.build_variant('folded', None)
    assert model.training
    assert {unit.rate for unit in mmexpand.surgery.named_units(model).values()} == {4}
    saved, output = saved_bytes(model, case.images(), case.forward)
    assert output[0].shape == (2, 125, 2, 3)
    assert saved.folding > 0

    compact = 'yolo-lite_1xb64-600k_voc0712-224x224.py'
    with pytest.raises(ValueError, match='expands nothing'):
        config_case(compact, Config.fromfile(folder / compact), 2, (64, 96))


@pytest.mark.parametrize(
    ('method', 'forward', 'runs'),
    [
        ('cl', 'auto', 'folded'),
        ('cl', 'layerwise', 'layerwise'),
        ('repvgg', 'auto', 'auto'),
        ('repvgg', 'folded', 'folded'),
        ('bn', 'layerwise', 'layerwise'),
    ],
)
def test_a_plan_names_the_forward_in_training(method, forward, runs):
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    mmexpand.expand_(model, method=method, forward=forward)
    (cost,) = layer_costs(model, lambda m: m(torch.zeros(1, 4, 32, 32))).values()
    assert cost.runs == runs
