"""The demo: `vla_node` and a replay as real ROS processes, watched from a third.

Leaves overlays, a plot of kept tokens, mode and latency per query, and a printed table.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rich.console import Console
from rich.progress import Progress
from sensor_msgs.msg import Image

from specprune_ros.config import AXES, PolicyConfig
from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError, SpecPruneError
from specprune_ros.msg import ActionChunk, PruningDiagnostics
from specprune_ros.offline import fit_robot
from specprune_ros.recordings import open_recording
from specprune_ros.ros import conversions, qos
from specprune_ros.ros.arguments import ros_arguments
from specprune_ros.ros.lifecycle import LifecycleClient
from specprune_ros.ros.process import shut_down_rclpy
from specprune_ros.runlog import RunLog

PARAMS = ('robots/libero_franka_3cam', 'models/tiny', 'pruning/specprune', 'node')
DEFAULT_RECORDING = Path('test/data/pick_place')
STOP_S = 3.0  # a process that needs longer to end is a failure
TIMEOUT_S = 120.0


class Watcher(Node):
    """Collects what vla_node publishes into a RunLog."""

    def __init__(self, log: RunLog, cameras: tuple[str, ...]):
        super().__init__('demo_watcher')
        self.log = log
        self.faults: dict[str, str] = {}
        self._chunks: dict[int, object] = {}
        self._cameras = cameras
        self._overlays: Counter[str] = Counter()
        self.create_subscription(ActionChunk, 'vla_node/action_chunk', self._on_chunk, 10)
        self.create_subscription(PruningDiagnostics, 'vla_node/pruning', self._on_report, 10)
        self.create_subscription(
            DiagnosticArray, '/diagnostics', self._on_diagnostics, qos.DIAGNOSTICS
        )
        for camera in cameras:
            self.create_subscription(
                Image, f'vla_node/overlay/{camera}', self._overlay_callback(camera), qos.SENSOR
            )

    def complete(self, chunks: int) -> bool:
        """Whether that many queries came, each with an overlay per camera."""
        overlays = min(self._overlays[camera] for camera in self._cameras)
        return len(self.log.reports) >= chunks and overlays >= chunks

    def _on_chunk(self, msg: ActionChunk) -> None:
        self._chunks[msg.chunk_id] = conversions.chunk_from_msg(msg)

    def _on_report(self, msg: PruningDiagnostics) -> None:
        chunk = self._chunks.pop(msg.chunk_id, None)
        if chunk is not None:
            self.log.add(chunk, conversions.report_from_msg(msg))

    def _overlay_callback(self, camera: str):
        def on_overlay(msg: Image) -> None:
            image = np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.width, 3)
            self.log.add_overlay(camera, self._overlays[camera], image)
            self._overlays[camera] += 1

        return on_overlay

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            if status.name.endswith('faults'):
                self.faults |= {v.key: v.value for v in status.values if '(last)' in v.key}


def write_params(config: PolicyConfig, path: Path) -> None:
    """The configuration as a ROS parameter file."""
    axes = {axis: dataclasses.asdict(getattr(config, axis)) for axis in AXES}
    for values in axes.values():
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value) or ['']
    tree = {'/**': {'ros__parameters': axes}}
    # Quoted strings: ROS reads a bare y as a boolean.
    path.write_text(yaml.dump(tree, sort_keys=False, default_style=None, Dumper=_Quoting))


class _Quoting(yaml.SafeDumper):
    """Dumps every string value in quotes."""


_Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar('tag:yaml.org,2002:str', text, style="'")
)


def start(module: str, out: Path, *arguments: str) -> subprocess.Popen:
    """Start one of our nodes as a process of its own; its output goes to a file."""
    command = [sys.executable, '-m', f'specprune_ros.ros.{module}', *arguments]
    with (out / f'{module}.log').open('w') as log:
        # A session of its own: Ctrl-C in the terminal reaches the demo alone, which then stops it.
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def stop(processes: dict[str, subprocess.Popen]) -> list[str]:
    """SIGINT all processes at once.

    Returns:
        What went wrong: any that did not end with status 0 in time.
    """
    for process in processes.values():
        process.send_signal(signal.SIGINT)
    problems, end = [], time.monotonic() + STOP_S
    for name, process in processes.items():
        try:
            status = process.wait(max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problems.append(f'{name} did not end within {STOP_S:g} s of SIGINT')
        else:
            problems += [f'{name} ended with status {status}'] if status else []
    return problems


def watch(watcher: Watcher, processes: dict[str, subprocess.Popen], chunks: int) -> str:
    """Wait for the chunks.

    Returns:
        '' when they came, else why not.
    """
    end = time.monotonic() + TIMEOUT_S
    with Progress() as progress:
        task = progress.add_task('chunks', total=chunks)
        while not watcher.complete(chunks):
            rclpy.spin_once(watcher, timeout_sec=0.1)
            progress.update(task, completed=len(watcher.log.reports))
            for name, process in processes.items():
                if process.poll() is not None:
                    return f'{name} ended with status {process.returncode}'
            if time.monotonic() > end:
                return f'only {len(watcher.log.reports)} chunks within {TIMEOUT_S:g} s'
    return ''


def run(arguments: argparse.Namespace, console: Console) -> list[str]:
    """Run the demo; returns what went wrong."""
    if arguments.chunks < 1:
        raise ConfigError('--chunks', arguments.chunks, 'must be at least 1')
    recording = open_recording(arguments.recording, instruction=arguments.instruction)
    config = fit_robot(load_config(arguments.params or PARAMS), recording)
    log = RunLog(arguments.out)
    params = arguments.out / 'params.yaml'
    write_params(config, params)
    console.print(f'replaying {recording.path}: cameras {", ".join(config.robot.camera_names)}')
    replay = {
        'recording': str(Path(recording.path).resolve()),
        'loop': True,
        'instruction': arguments.instruction,
    }
    out = arguments.out
    processes = {
        'vla_node': start('vla_node', out, '--ros-args', '--params-file', str(params)),
        'replay_node': start('replay_node', out, *ros_arguments(replay)),
    }
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    problems = []
    try:
        watcher = Watcher(log, config.robot.camera_names)
        vla = LifecycleClient(watcher, 'vla_node')
        vla.wait()
        if not (vla.change('configure') and vla.change('activate')):
            problems.append(f'vla_node could not be activated, see {arguments.out}/vla_node.log')
        else:
            problems.append(watch(watcher, processes, arguments.chunks))
        for fault, message in watcher.faults.items():
            console.print(f'{fault}: {message}', style='yellow')
    except TimeoutError as error:
        problems.append(str(error))
    except KeyboardInterrupt:
        problems.append('interrupted')
    finally:
        shut_down_rclpy()
        problems += stop(processes)
    console.print(log.finish())
    if not recording.has_actions:
        console.print('no executed actions in the recording: motion is unknown, so pruned gently')
    console.print(f'{arguments.out}: overlays/, queries.png, reports.jsonl, chunks.npz, *.log')
    return [problem for problem in problems if problem]


def main(argv: list[str] | None = None) -> int:
    """Entry point of scripts/demo.sh."""
    parser = argparse.ArgumentParser(prog='demo.sh', description=__doc__.splitlines()[0])
    parser.add_argument(
        '--recording', default=DEFAULT_RECORDING, help='rosbag2, .npz observation, or video'
    )
    parser.add_argument('--instruction', default='', help="the task instead of the recording's")
    parser.add_argument('--out', type=Path, default=Path('out'), help='output folder')
    parser.add_argument('--chunks', type=int, default=20, help='how many to wait for')
    parser.add_argument('--params', action='append', help='parameter file; may be repeated')
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        problems = run(parser.parse_args(argv), console)
    except SpecPruneError as error:
        problems = [str(error)]
    for problem in problems:
        console.print(f'demo: {problem}', style='bold red')
    return 1 if problems else 0


if __name__ == '__main__':
    raise SystemExit(main())
