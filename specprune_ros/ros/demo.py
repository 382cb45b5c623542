"""The demo on a recording: `vla_node` and a replay as ROS processes, watched from a third.

Leaves overlays, a plot of kept tokens, mode and latency per query, and a printed table.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import time
from pathlib import Path

import rclpy
from rclpy.signals import SignalHandlerOptions
from rich.console import Console
from rich.progress import Progress

from specprune_ros.config import AXES, PolicyConfig
from specprune_ros.config_files import load_config, write_parameter_file
from specprune_ros.errors import ConfigError
from specprune_ros.offline import fit_robot
from specprune_ros.recordings import BagRecording, open_recording
from specprune_ros.ros.arguments import ros_arguments
from specprune_ros.ros.demo_watch import Watcher, ended, exit_status, start, stop
from specprune_ros.ros.lifecycle import LifecycleClient
from specprune_ros.ros.process import shut_down_rclpy
from specprune_ros.runlog import RunLog

PARAMS = ('robots/libero_franka_3cam', 'models/tiny', 'pruning/specprune', 'node')
# Of a checkout, to which an installed package's files are links.
DEFAULT_RECORDING = Path(__file__).resolve().parents[2] / 'test/data/pick_place'
TIMEOUT_S = 120.0


def write_params(config: PolicyConfig, path: Path) -> None:
    """The configuration as a ROS parameter file."""
    axes = {axis: dataclasses.asdict(getattr(config, axis)) for axis in AXES}
    for values in axes.values():
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value) or ['']
    write_parameter_file(path, {'/**': axes})


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
            if problem := ended(processes):
                return problem
            if time.monotonic() > end:
                return f'only {len(watcher.log.reports)} chunks within {TIMEOUT_S:g} s'
    return ''


def run(arguments: argparse.Namespace, console: Console) -> list[str]:
    """Run the demo; returns what went wrong."""
    if arguments.chunks < 1:
        raise ConfigError('--chunks', arguments.chunks, 'must be at least 1')
    config = load_config(arguments.params or PARAMS)
    recording = open_recording(
        arguments.recording, instruction=arguments.instruction, robot=config.robot
    )
    config = fit_robot(config, recording)
    log = RunLog(arguments.out)
    params = arguments.out / 'params.yaml'
    write_params(config, params)
    console.print(f'replaying {recording.path}: cameras {", ".join(config.robot.camera_names)}')
    replay = {
        'recording': str(Path(recording.path).resolve()),
        'loop': True,
        'instruction': arguments.instruction,
        'transport': config.robot.camera_transports[0],
    }
    if isinstance(recording, BagRecording):
        replay['cameras'] = [f'{name}={t}' for name, t in recording.image_topics.items()]
    out = arguments.out
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    processes, problems = {}, []
    try:
        own = ['--ros-args', '--params-file', str(params)]
        for module, words in (('vla_node', own), ('replay_node', ros_arguments(replay))):
            processes[module] = start(module, words, out=out)
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
        '--recording',
        nargs='?',
        const=DEFAULT_RECORDING,
        default=DEFAULT_RECORDING,
        help='rosbag2, .npz observation, or video',
    )
    parser.add_argument('--instruction', default='', help="the task instead of the recording's")
    parser.add_argument('--out', type=Path, default=Path('out'), help='output folder')
    parser.add_argument('--chunks', type=int, default=20, help='how many to wait for')
    parser.add_argument('--params', action='append', help='parameter file; may be repeated')
    return exit_status(run, parser.parse_args(argv))


if __name__ == '__main__':
    raise SystemExit(main())
