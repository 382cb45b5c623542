"""What action_streamer's `/diagnostics` show: state, input rates and ages, limits."""

from __future__ import annotations

import math
import time

from diagnostic_msgs.msg import DiagnosticStatus

from specprune_ros.ros import diagnostics
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.streamer import Streamer, StreamState

LEVELS = {
    StreamState.STALLED: diagnostics.ERROR,
    StreamState.STOPPED: diagnostics.ERROR,
    StreamState.PAUSED: diagnostics.WARN,
}


class Arrivals:
    """When something last came, and how often, in steady time."""

    def __init__(self):
        self._last_s = -math.inf
        self._count = 0
        self._looked_s = time.monotonic()

    def count(self) -> None:
        """It came."""
        self._last_s = time.monotonic()
        self._count += 1

    def age_s(self) -> float:
        """Seconds since it last came; infinite when it never did."""
        return time.monotonic() - self._last_s

    def rate_hz(self) -> float:
        """How often it came per second since the last call."""
        now_s, count = time.monotonic(), self._count
        elapsed_s, self._looked_s, self._count = now_s - self._looked_s, now_s, 0
        return count / elapsed_s


class Monitor:
    """Counts for one configured streamer.

    Attributes:
        inputs: subscribed topic -> what arrives there.
        steps: control steps.
        commands: commands computed.
        malformed: chunk messages that were no chunks.
    """

    def __init__(self, config: StreamerConfig, streamer: Streamer):
        self._config = config
        self._streamer = streamer
        self._limited = 0  # clamped and rejected elements at the last look
        self.inputs: dict[str, Arrivals] = {}
        self.steps = Arrivals()
        self.commands = Arrivals()
        self.malformed = 0

    def statuses(
        self, node: str, fault: str, silence_s: dict[str, float]
    ) -> list[DiagnosticStatus]:
        """The status lines.

        Args:
            node: name that the lines carry.
            fault: what went wrong last, in words.
            silence_s: input topic -> age from which on it is stale.
        """
        return [self._stream(node, fault), self._inputs(node, silence_s), self._limits(node)]

    def _stream(self, node: str, fault: str) -> DiagnosticStatus:
        core, stream = self._streamer, self._config.stream
        values = {
            'output': stream.output,
            'dry run': str(stream.dry_run),
            'control rate Hz': f'{self.steps.rate_hz():.1f}',
            'command rate Hz': f'{self.commands.rate_hz():.1f}',
            'commands': str(core.commands),
            'chunk': str(core.chunk_id),
            'queue depth': str(core.queue_depth),
            'chunks rejected': str(core.chunks_rejected + self.malformed),
        }
        state = StreamState(core.state)
        message = state.name.lower()
        if state in (StreamState.STALLED, StreamState.STOPPED):
            message += f': {fault}'
        level = LEVELS.get(state, diagnostics.OK)
        return diagnostics.status(f'{node}: streamer', level, message, values)

    def _inputs(self, node: str, silence_s: dict[str, float]) -> DiagnosticStatus:
        values, silent = {}, []
        for topic, arrivals in self.inputs.items():
            age_s = arrivals.age_s()
            values[f'{topic} rate Hz'] = f'{arrivals.rate_hz():.1f}'
            values[f'{topic} age s'] = f'{age_s:.3f}'
            if age_s > silence_s.get(topic, math.inf):
                silent.append(topic)
        level = diagnostics.STALE if silent else diagnostics.OK
        message = f'nothing from {", ".join(silent)}' if silent else 'all there'
        return diagnostics.status(f'{node}: inputs', level, message, values)

    def _limits(self, node: str) -> DiagnosticStatus:
        core, values = self._streamer, {}
        names = self._config.robot.action_names
        for axis, clamped, rejected in zip(names, core.clamped, core.rejected, strict=True):
            values |= {f'{axis} clamped': str(clamped), f'{axis} rejected': str(rejected)}
        total = int(sum(core.clamped)) + int(sum(core.rejected))
        new, self._limited = total - self._limited, total
        level = diagnostics.WARN if new else diagnostics.OK
        return diagnostics.status(f'{node}: limits', level, f'{new} new, {total} in all', values)
