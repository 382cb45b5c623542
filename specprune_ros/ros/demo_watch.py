"""What both demos share: nodes as processes, and a node that watches what `vla_node` publishes."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rich.console import Console
from sensor_msgs.msg import Image

from specprune_ros.errors import SpecPruneError
from specprune_ros.msg import ActionChunk, PruningDiagnostics
from specprune_ros.ros import conversions, qos
from specprune_ros.runlog import RunLog

STOP_S = 3.0  # a process that needs longer to end is a failure


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


def exit_status(
    run: Callable[[argparse.Namespace, Console], list[str]], arguments: argparse.Namespace
) -> int:
    """Run a demo, and print what went wrong; a signal ends it as Ctrl-C does."""
    console = Console()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        problems = run(arguments, console)
    except SpecPruneError as error:
        problems = [str(error)]
    for problem in problems:
        console.print(f'demo: {problem}', style='bold red')
    return 1 if problems else 0


def start(
    module: str, arguments: Sequence[str], python: str = sys.executable, *, out: Path
) -> subprocess.Popen:
    """Start one of our nodes as a process of its own; its output goes to a file in `out`."""
    command = [python, '-m', f'specprune_ros.ros.{module}', *arguments]
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


def ended(processes: dict[str, subprocess.Popen]) -> str:
    """Which of them ended by itself, in words; '' for none."""
    for name, process in processes.items():
        if process.poll() is not None:
            return f'{name} ended with status {process.returncode}'
    return ''
