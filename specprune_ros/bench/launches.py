"""What the host does during a query, by a profiler: operators, launches, waits and copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from specprune_ros.bench.variants import Variant, execute_chunk, scene

BEFORE = 5  # queries before the profiled ones: both modes recorded, and replayed once
PROFILED = 2  # one of either mode
# Operators that hand a number to the host, or whose result's size depends on the data.
HOST_READS = ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select')
LAUNCHES = ('cudaLaunchKernel', 'cudaLaunchKernelExC', 'cuLaunchKernel', 'cuLaunchKernelEx')
GRAPHS = ('cudaGraphLaunch',)
WAITS = ('cudaStreamSynchronize', 'cudaEventSynchronize', 'cudaDeviceSynchronize')
COPIES = ('cudaMemcpyAsync', 'cudaMemcpy')


@dataclass(frozen=True)
class Launches:
    """Counts per query, the mean of one coarse and one fine one.

    Attributes:
        method, form, cameras: which variant.
        operators: that the host dispatched, those within others included.
        host_reads: operators of HOST_READS.
        kernels, graphs: launches by the host.
        waits: calls in which the host waited for the device; two are the query's end: its actions
            and its clock.
        copies: asynchronous or not, in any direction, outside graphs.
    """

    method: str
    form: str
    cameras: int
    operators: float
    host_reads: float
    kernels: float
    graphs: float
    waits: float
    copies: float


def launches_of(variant: Variant) -> Launches:
    """Profile two queries in the middle of an episode."""
    policy, info = variant.policy, variant.policy.model.info
    policy.reset()
    counts: dict[str, int] = {}
    for step in range(BEFORE + PROFILED):
        observation = scene(info.cameras, step, info.proprio_dim)
        if step < BEFORE:
            policy.infer(observation)
        else:
            with profile(activities=_activities()) as profiler:
                policy.infer(observation)
            for event in profiler.key_averages():
                counts[event.key] = counts.get(event.key, 0) + event.count
        execute_chunk(policy, observation, step)

    def per_query(names: Sequence[str]) -> float:
        return sum(counts.get(name, 0) for name in names) / PROFILED

    return Launches(
        method=variant.method,
        form=variant.label,
        cameras=variant.cameras,
        operators=per_query([name for name in counts if name.startswith('aten::')]),
        host_reads=per_query(HOST_READS),
        kernels=per_query(LAUNCHES),
        graphs=per_query(GRAPHS),
        waits=per_query(WAITS),
        copies=per_query(COPIES),
    )


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]


def launches_table(rows: Sequence[Launches]) -> str:
    """A line per variant."""
    lines = [
        f'{"cams":>4} {"method":<10} {"form":<13} {"operators":>9} {"host reads":>10} '
        f'{"kernels":>8} {"graphs":>7} {"waits":>6} {"copies":>7}   (per query)'
    ]
    for row in rows:
        lines.append(
            f'{row.cameras:>4} {row.method:<10} {row.form:<13} {row.operators:>9.0f} '
            f'{row.host_reads:>10.1f} {row.kernels:>8.0f} {row.graphs:>7.1f} {row.waits:>6.1f} '
            f'{row.copies:>7.1f}'
        )
    return '\n'.join(lines)
