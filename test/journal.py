"""A pytest plugin: `--journal FILE` notes how tests ended, and leaves out those that stand there.

rclpy now and then takes the interpreter down where a node is destroyed; scripts/test.sh goes on
behind that.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser) -> None:
    parser.addoption('--journal', type=Path, help='file of the tests that have ended')


def pytest_configure(config) -> None:
    if path := config.getoption('--journal'):
        config.pluginmanager.register(Journal(path))


class Journal:
    """One line per test: how it ended, and its name.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items) -> None:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        ended = {line.partition(' ')[2] for line in lines}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in ended])
        items[:] = [item for item in items if item.nodeid not in ended]

    def pytest_runtest_logreport(self, report) -> None:
        self._failed = report.failed or (self._failed and report.when != 'setup')
        if report.when == 'teardown':
            with self._path.open('a') as file:
                file.write(f'{"failed" if self._failed else "passed"} {report.nodeid}\n')
