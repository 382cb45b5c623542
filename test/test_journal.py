"""The tests go on behind a crash of their interpreter, and forget no failure."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = """
import os, signal
def test_good(): pass
def test_bad(): assert False
def test_that_crashes_once():
    if not os.path.exists('crashed'):
        open('crashed', 'w').close()
        os.kill(os.getpid(), signal.SIGSEGV)
def test_last(): pass
"""


def run(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'pytest', '-p', 'journal', '--journal', 'journal', '-v']
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent)}
    return subprocess.run(
        [*command, '-p', 'no:cacheprovider', 'test_some.py'], cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_second_run_goes_on_where_the_first_one_crashed(tmp_path):
    (tmp_path / 'test_some.py').write_text(TESTS)
    journal = tmp_path / 'journal'
    assert run(tmp_path).returncode == -signal.SIGSEGV
    assert journal.read_text().split()[::2] == ['passed', 'failed']
    second = run(tmp_path)
    assert second.returncode == 0
    assert '2 passed, 2 deselected' in second.stdout
    names = [line.partition('::')[2] for line in journal.read_text().splitlines()]
    assert names == ['test_good', 'test_bad', 'test_that_crashes_once', 'test_last']
    assert 'failed test_some.py::test_bad' in journal.read_text()
