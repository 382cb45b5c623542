"""The data that flows through the package: observation in, action chunk and report out.

Plain frozen dataclasses over NumPy, without torch and without ROS. `ActionChunk`, `ExecutedAction`
and `PruneReport` have the fields of the messages of (nearly) the same name, so that one loop
converts them; `test_messages.py` fails when they drift apart. Times are integer nanoseconds of
whatever clock stamped the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

import numpy as np

# Control steps whose images an episode keeps: the reference frame is at most 11 steps old (T of
# SpecPrune-VLA 4.1.2 at rest).
FRAMES_KEPT = 12
MAX_STEPS = 1024  # executed steps kept while no query comes


class Mode(IntEnum):
    """How hard one inference prunes."""

    DENSE = 0
    COARSE = 1
    FINE = 2
    FALLBACK = 3


class Reason(IntFlag):
    """Why a patch was wanted after static pruning; a patch may have several reasons."""

    GLOBAL = 1
    DYNAMIC = 2
    LOCAL = 4
    FILL = 8


class ActionSpace(IntEnum):
    """What the numbers of an action command."""

    JOINT_POSITION = 0
    JOINT_VELOCITY = 1
    EEF_DELTA_POSE = 2
    EEF_TWIST = 3
    JOINT_DELTA = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation:
    """All that one inference reads.

    Attributes:
        images: camera name -> [H, W, 3] uint8 RGB of any size, or an images.CameraImage, which is
            decoded when it is needed.
        proprio: [P] joint positions and end-effector pose in the order of
            `RobotConfig.joint_names` (rad or m), or None for a robot without proprioception.
        instruction: what to do, in the user's words.
        stamp_ns: stamp of the oldest input.
        image_stamps_ns: camera -> its image's stamp, where a caller knows them.
        proprio_stamps_ns: of the joint state and the end-effector pose, as far as needed.
    """

    images: Mapping[str, np.ndarray | object]
    proprio: np.ndarray | None
    instruction: str
    stamp_ns: int
    image_stamps_ns: Mapping[str, int] = field(default_factory=dict)
    proprio_stamps_ns: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class ExecutedAction:
    """One action that was really sent to the robot (message ExecutedAction).

    Attributes:
        data: [A] the command, in `units`.
        names: [A] what each element commands.
        units: [A] 'm', 'rad' or '1'.
    """

    stamp_ns: int
    names: tuple[str, ...]
    units: tuple[str, ...]
    data: np.ndarray
    space: int = ActionSpace.EEF_DELTA_POSE
    frame_id: str = ''
    chunk_id: int = 0
    epoch: int = 0
    step: int = 0
    step_dt_s: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class ActionChunk:
    """The next L control steps (message ActionChunk); step i is for stamp + (i + 1) * step_dt.

    Attributes:
        data: [L, A] float64, un-normalised and within the limits, in `units`.
        normalized: [L, A] float64, the action head's own output.
        clamped: how many elements of `data` the limits changed.
        stand_in: True when stand-in weights made it: its actions mean nothing.
    """

    stamp_ns: int
    observation_stamp_ns: int
    frame_id: str
    step_dt_s: float
    valid_for_s: float
    chunk_id: int
    epoch: int
    space: int
    names: tuple[str, ...]
    units: tuple[str, ...]
    data: np.ndarray
    normalized: np.ndarray
    clamped: int
    dry_run: bool
    stand_in: bool

    @property
    def horizon(self) -> int:
        """L, the number of steps."""
        return len(self.data)


def _none(dtype: type) -> np.ndarray:
    return np.zeros(0, dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneReport:
    """What pruning did in one inference (message PruningDiagnostics, whose comments give units).

    V cameras, N_v patches of camera v; `reason`, `pruned_after_layer` and `important` hold the
    cameras one after another, row-major.
    """

    stamp_ns: int
    chunk_id: int
    epoch: int
    method: str
    budget: str
    alpha: float
    mode: int
    mode_reason: str
    query: int = 0
    instruction: str = ''
    image_stamps_ns: np.ndarray = field(default_factory=lambda: _none(np.int64))  # [V]
    proprio_stamps_ns: np.ndarray = field(default_factory=lambda: _none(np.int64))
    executed_stamps_ns: np.ndarray = field(default_factory=lambda: _none(np.int64))  # [M]
    # [M * V]
    executed_image_stamps_ns: np.ndarray = field(default_factory=lambda: _none(np.int64))
    fallback_reason: str = ''
    translation_speed: float = float('nan')
    rotation_speed: float = float('nan')
    vertical_displacement: float = float('nan')
    chunk_displacement: float = 0.0
    reference_age: int = 0
    cameras: tuple[str, ...] = ()
    grid_rows: np.ndarray = field(default_factory=lambda: _none(np.uint32))  # [V]
    grid_cols: np.ndarray = field(default_factory=lambda: _none(np.uint32))  # [V]
    rotation_deg: np.ndarray = field(default_factory=lambda: _none(np.uint32))  # [V]
    crop_side: float = 1.0
    tokens_total: np.ndarray = field(default_factory=lambda: _none(np.uint32))  # [V]
    tokens_static: np.ndarray = field(default_factory=lambda: _none(np.uint32))  # [V]
    tokens_kept: np.ndarray = field(default_factory=lambda: _none(np.uint32))  # [V]
    recall: np.ndarray = field(default_factory=lambda: _none(np.float64))  # [V]
    recall_mean: np.ndarray = field(default_factory=lambda: _none(np.float64))  # [V]
    flops_share: float = 1.0
    guard_disagreement: float = float('nan')
    reason: np.ndarray = field(default_factory=lambda: _none(np.uint8))  # [sum N_v]
    pruned_after_layer: np.ndarray = field(default_factory=lambda: _none(np.uint8))  # [sum N_v]
    important: np.ndarray = field(default_factory=lambda: _none(np.uint8))  # [sum N_v]
    static_layer: int = 0
    layer_index: np.ndarray = field(default_factory=lambda: _none(np.uint32))
    layer_tokens: np.ndarray = field(default_factory=lambda: _none(np.uint32))
    layer_confidence: np.ndarray = field(default_factory=lambda: _none(np.float64))
    sequence_tokens: int = 0
    latency_preprocess_s: float = 0.0
    latency_embed_s: float = 0.0
    latency_decode_s: float = 0.0
    latency_act_s: float = 0.0
    latency_pruning_s: float = 0.0
    latency_total_s: float = 0.0
    stand_in: bool = False

    def camera_grid(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """`reason` and `pruned_after_layer` of one camera, each [rows, cols].

        Raises:
            KeyError: no such camera in this report.
        """
        if camera not in self.cameras:
            raise KeyError(camera)
        index = self.cameras.index(camera)
        start = int(self.tokens_total[:index].sum())
        span = slice(start, start + int(self.tokens_total[index]))
        shape = (int(self.grid_rows[index]), int(self.grid_cols[index]))
        return self.reason[span].reshape(shape), self.pruned_after_layer[span].reshape(shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class PolicyResult:
    """What `Policy.infer` returns."""

    chunk: ActionChunk
    report: PruneReport
