"""The demo in closed loop: `sim_node`, `vla_node` and `action_streamer`; the arm does the task.

Starts the nodes as processes and drives them from a fourth, as a person would: begin an episode,
let the arm move, wait for LIBERO's own success check, hold. `--attach` drives nodes that run
already, see launch/demo.launch.py. Leaves overlays as videos, a plot of kept tokens, mode and
latency per query, and the episodes as JSON; a table is printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rclpy
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.signals import SignalHandlerOptions
from rich.console import Console
from rich.table import Table
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from specprune_ros.config_files import find_config, load_config
from specprune_ros.errors import ConfigError, SpecPruneError
from specprune_ros.ros import qos
from specprune_ros.ros.arguments import ros_arguments
from specprune_ros.ros.demo_watch import Watcher, ended, exit_status, start, stop
from specprune_ros.ros.lifecycle import LifecycleClient
from specprune_ros.ros.process import shut_down_rclpy
from specprune_ros.runlog import RunLog
from specprune_ros.shipped import EMBEDDED

PARAMS = (f'robots/{EMBEDDED}', f'models/{EMBEDDED}', 'pruning/specprune', 'node')
SIZE = 112  # px, of the images that the model was trained on
TIMEOUT_S = 90.0  # for each of the things that are waited for
START_FACTOR = 2.0
CALL_S = 30.0
ENDS = ('success', 'failed')  # of an episode, by LIBERO's check and its step limit


class Driver(Watcher):
    """Begins episodes, lets the arm move, and hears how they end."""

    def __init__(self, log: RunLog, cameras: tuple[str, ...]):
        super().__init__(log, cameras)
        self.episode: dict[str, object] = {}
        self.chunks = 0  # since the episode began
        self.create_subscription(String, 'sim_node/episode', self._on_episode, qos.LATCHED)
        self._seed = self.create_client(SetParameters, 'sim_node/set_parameters')
        self._reset = self.create_client(Trigger, 'sim_node/reset')
        self._cancel = self.create_client(Trigger, 'vla_node/cancel_task')
        self._enable = self.create_client(SetBool, 'action_streamer/enable')

    def run_episode(
        self, seed: int, alive: Callable[[], str], slowness: float = 1.0
    ) -> dict[str, object]:
        """One episode from the simulator's reset to its verdict.

        Args:
            seed: of the initial state.
            alive: says which process is gone; '' while all run.
            slowness: seconds per simulated second, where that is more than one.

        Returns:
            what `sim_node/episode` said last.

        Raises:
            DemoError: something did not come in time, or is gone.
        """
        # A simulator that was just installed compiles first: its own answer comes too late.
        self._wait(lambda: bool(self.episode), 'sim_node to begin', alive, START_FACTOR)
        if self.episode['state'] not in ('running', *ENDS):
            raise DemoError(f'sim_node {self.episode["state"]}: the reason is in its log')
        self._call(self._cancel, Trigger.Request())  # the last one's task, if it still runs
        value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed)
        parameters = [Parameter(name='seed', value=value)]
        answer = self._call(self._seed, SetParameters.Request(parameters=parameters))
        if not answer.results[0].successful:
            raise DemoError(f'sim_node refuses seed {seed}: {answer.results[0].reason}')
        self.episode, self.chunks = {}, 0
        answer = self._call(self._reset, Trigger.Request())
        if not answer.success:
            raise DemoError(f'sim_node does not begin: {answer.message}')
        self._wait(lambda: self.chunks > 0, 'a chunk of vla_node', alive)
        self._let_move(alive)
        going_on = (None, 'running')
        self._wait(lambda: self.episode.get('state') not in going_on, 'the end', alive, slowness)
        self._call(self._enable, SetBool.Request(data=False))
        if self.episode['state'] not in ENDS:
            raise DemoError(f'sim_node is {self.episode["state"]}, see its log')
        return self.episode

    def _let_move(self, alive: Callable[[], str]) -> None:
        """`~/enable`, as often as the streamer says that something is not there yet."""
        answer = None

        def enabled() -> bool:
            nonlocal answer
            answer = self._call(self._enable, SetBool.Request(data=True))
            return answer.success

        try:
            self._wait(enabled, 'action_streamer to move the arm', alive)
        except DemoError as error:
            raise DemoError(f'{error}: {answer.message}' if answer else str(error)) from error

    def _wait(
        self,
        is_so: Callable[[], bool],
        what: str,
        alive: Callable[[], str],
        slowness: float = 1.0,
    ) -> None:
        limit_s = TIMEOUT_S * max(slowness, 1.0)
        end = time.monotonic() + limit_s
        while not is_so():
            rclpy.spin_once(self, timeout_sec=0.1)
            if problem := alive():
                raise DemoError(problem)
            if time.monotonic() > end:
                raise DemoError(f'waited {limit_s:g} s for {what}')

    def _call(self, client, request):
        if not client.wait_for_service(CALL_S):
            raise DemoError(f'there is no service {client.srv_name}')
        future = client.call_async(request)
        rclpy.spin_until_future_complete(self, future, timeout_sec=CALL_S)
        if not future.done():
            raise DemoError(f'{client.srv_name} did not answer within {CALL_S:g} s')
        return future.result()

    def _on_chunk(self, msg) -> None:
        super()._on_chunk(msg)
        self.chunks += 1

    def _on_episode(self, msg: String) -> None:
        self.episode = json.loads(msg.data)


class DemoError(SpecPruneError):
    """The demo cannot go on."""


def node_commands(arguments: argparse.Namespace) -> dict[str, tuple[str, list[str], str]]:
    """Of the three nodes: module, arguments and the Python that runs it."""
    files = [word for name in params_of(arguments) for word in ('--params-file', str(name))]
    simulated = {'task': arguments.task, 'size': SIZE, 'rate': arguments.rate}

    def own(name: str, **values: object) -> list[str]:
        """Files, and values that outrank them: a section for one node would outrank `**`."""
        values['use_sim_time'] = True
        named = {f'{name}:{k.replace("__", ".")}': value for k, value in values.items()}
        return ['--ros-args', *files, *ros_arguments(named)[1:]]

    vla = own('vla_node', runtime__dry_run=False)
    streamer = own('action_streamer', stream__dry_run=False)
    return {
        'sim_node': ('sim_node', ros_arguments(simulated), arguments.sim_python),
        'vla_node': ('vla_node', vla, sys.executable),
        'action_streamer': ('streamer_node', streamer, sys.executable),
    }


def params_of(arguments: argparse.Namespace) -> list[Path]:
    """Parameter files of the nodes."""
    return [find_config(name).resolve() for name in arguments.params or PARAMS]


def activate(driver: Driver) -> None:
    """Bring both lifecycle nodes up.

    Raises:
        DemoError: one would not.
        TimeoutError: one is not there.
    """
    for name in ('vla_node', 'action_streamer'):
        node = LifecycleClient(driver, name)
        node.wait()
        if not (node.change('configure') and node.change('activate')):
            raise DemoError(f'{name} could not be activated, see its log')


def episode_table(episodes: list[dict[str, object]]) -> Table:
    """How they ended."""
    solved = sum(episode['state'] == 'success' for episode in episodes)
    table = Table(title=f'{solved} of {len(episodes)} episodes solved')
    for name in ('task', 'seed', 'LIBERO says', 'control steps'):
        table.add_column(name)
    for episode in episodes:
        table.add_row(*(str(episode[name]) for name in ('task', 'seed', 'state', 'step')))
    return table


def run(arguments: argparse.Namespace, console: Console) -> list[str]:
    """Run the demo; returns what went wrong."""
    if arguments.episodes < 1:
        raise ConfigError('--episodes', arguments.episodes, 'must be at least 1')
    if not arguments.rate > 0.0:
        raise ConfigError('--rate', arguments.rate, 'must be above 0')
    if not shutil.which(arguments.sim_python):
        raise ConfigError('--sim-python', arguments.sim_python, 'no such program')
    config = load_config(params_of(arguments))
    out = arguments.out
    log = RunLog(out, video=True, fps=1.0 / config.query_period_s)
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    processes, problems, episodes = {}, [], []
    try:
        driver = Driver(log, config.robot.camera_names)
        if not arguments.attach:
            for name, command in node_commands(arguments).items():
                processes[name] = start(*command, out=out)
            activate(driver)
        for seed in range(arguments.seed, arguments.seed + arguments.episodes):
            alive = partial(ended, processes)
            episodes.append(driver.run_episode(seed, alive, 1.0 / arguments.rate))
            console.print('{task}, seed {seed}: {state} after {step} steps'.format(**episodes[-1]))
        for fault, message in driver.faults.items():
            console.print(f'{fault}: {message}', style='yellow')
    except (TimeoutError, DemoError) as error:
        problems.append(str(error))
    except KeyboardInterrupt:
        problems.append('interrupted')
    finally:
        shut_down_rclpy()
        problems += stop(processes)
    (out / 'episodes.json').write_text(json.dumps(episodes, indent=2) + '\n')
    if not episodes:
        console.print(f"no episode was run; the nodes' logs are in {out}")
        return problems
    console.print(log.finish())
    console.print(episode_table(episodes))
    console.print(f'{out}: overlay_*.mp4, queries.png, episodes.json, reports.jsonl, *.log')
    return problems


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog='demo.sh', description=__doc__.splitlines()[0])
    parser.add_argument('--task', default='object_shuffled/1', help='what to do')
    parser.add_argument('--seed', type=int, default=1, help='of the first episode')
    parser.add_argument('--episodes', type=int, default=1, help='how many')
    parser.add_argument('--rate', type=float, default=1.0, help='simulated seconds per second')
    parser.add_argument('--out', type=Path, default=Path('out'), help='output folder')
    parser.add_argument('--params', action='append', help='parameter file; may be repeated')
    parser.add_argument('--sim-python', default=sys.executable, help="the simulator's Python")
    parser.add_argument('--attach', action='store_true', help='the nodes run already')
    return exit_status(run, parser.parse_args(argv))


if __name__ == '__main__':
    raise SystemExit(main())
