"""The walk in docs/how_it_works.md, from a hook to the compact checkpoint, is what is called."""

import re
import sys
from pathlib import Path

from mmengine.runner import Runner

import mmexpand
from mmexpand.mm.dry_run import DryRunHook

PACKAGE = Path(mmexpand.__file__).parent
PAGE = PACKAGE.parent / 'docs/how_it_works.md'
STEP = re.compile(r'^\d+\. `([\w/]+\.py)`: `([\w.]+)`', re.MULTILINE)
TITLE = 'From the hook to the compact checkpoint'
MOST_FILES = 8


def walk() -> list[tuple[str, str]]:
    """The steps of the list: a file and a function."""
    section = PAGE.read_text().partition(f'\n## {TITLE}\n')[2].partition('\n## ')[0]
    return [(file, name.rpartition('.')[2]) for file, name in STEP.findall(section)]


def ours(frame) -> tuple[str, str] | None:
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE):
        return None
    return path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name


def test_the_walk_is_what_a_training_does(seg_cfg, monkeypatch):
    steps = walk()
    files = {file for file, _ in steps}
    assert len(steps) > 5, 'the list was not found'
    assert len(files) <= MOST_FILES
    seen, callers = [], set()

    def watch(frame, event, _):
        step = ours(frame) if event == 'call' else None
        if step not in steps or step in seen:
            return
        seen.append(step)
        while (frame := frame.f_back) and not ours(frame):
            pass
        if frame:  # A step without a caller of ours is called by the Runner or by torch.
            callers.add(ours(frame)[0])

    # The dry run does the same as the end of the training, before it.
    monkeypatch.setattr(DryRunHook, 'before_train_iter', lambda *_, **__: None)
    hooks = [dict(type='ExpandHook', method='repvgg', include='backbone')]
    runner = Runner.from_cfg(seg_cfg(custom_hooks=[*hooks, dict(type='ContractHook')]))
    sys.setprofile(watch)
    try:
        runner.train()
    finally:
        sys.setprofile(None)
    assert seen == steps
    assert callers <= files, 'there are files on the way that the list does not name'
    assert (Path(runner.work_dir) / 'compact_last.pth').exists()
