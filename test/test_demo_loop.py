"""The closed loop as ROS processes: a simulated point, the shipped model, the streamer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip('rclpy', reason='no ROS here')
pytest.importorskip('specprune_ros.msg', reason='messages are not built')

from pathlib import Path

import dds_memory

from specprune_ros.ros import demo_loop

pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(240)]
ARM = Path(__file__).parent / 'point_arm.py'


@pytest.fixture
def point(monkeypatch):
    """`sim_node` around a point; the other nodes are the real ones."""

    def start(module, arguments, python, *, out):
        if module != 'sim_node':
            return start_really(module, arguments, python, out=out)
        process = subprocess.Popen([sys.executable, str(ARM), *arguments])
        started.append(process)
        return process

    start_really, started = demo_loop.start, []
    monkeypatch.setattr(demo_loop, 'start', start)
    monkeypatch.setenv('ROS_DOMAIN_ID', str((os.getpid() * 7 + 61) % 90 + 10))
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    yield started
    for process in started:
        dds_memory.kill(process)


def test_the_arm_moves_until_the_simulator_is_content(point, tmp_path, capsys):
    out = tmp_path / 'out'
    status = demo_loop.main(['--out', str(out), '--episodes', '2', '--seed', '3'])
    logs = {path.name: path.read_text() for path in out.glob('*.log')}
    assert status == 0, (capsys.readouterr().out, logs)
    episodes = json.loads((out / 'episodes.json').read_text())
    assert [episode['seed'] for episode in episodes] == [3, 4]
    assert {episode['state'] for episode in episodes} == {'success'}
    assert all(0 < episode['step'] < 200 for episode in episodes)
    reports = [json.loads(line) for line in (out / 'reports.jsonl').read_text().splitlines()]
    assert len({report['epoch'] for report in reports}) >= 2, 'each episode is a task of its own'
    pruned = [report for report in reports if report['mode'] in (1, 2)]
    assert any(report['executed_stamps_ns'] for report in pruned), 'it heard what it did'
    assert (out / 'queries.png').exists()
    assert (out / 'overlay_wrist.mp4').stat().st_size > 1000
    assert '2 of 2 episodes solved' in capsys.readouterr().out


@pytest.mark.parametrize('seed', [0, 13])
def test_a_simulator_that_dies_or_refuses_is_told(point, tmp_path, monkeypatch, capsys, seed):
    monkeypatch.setattr(demo_loop, 'CALL_S', 5.0)
    activate = demo_loop.activate

    def activated_and_killed(driver):
        activate(driver)
        if not seed:
            dds_memory.kill(point[0])

    monkeypatch.setattr(demo_loop, 'activate', activated_and_killed)
    assert demo_loop.main(['--out', str(tmp_path), '--seed', str(seed)]) == 1
    said = capsys.readouterr().out
    # What it called before discovery noticed, or after.
    gone = 'there is no service sim_node', 'sim_node/set_parameters did not answer'
    assert any(words in said for words in (['brings bad luck'] if seed else gone))
    assert 'no episode was run' in said
