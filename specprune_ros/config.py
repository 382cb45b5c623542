"""Configuration: frozen dataclasses, one per axis.

A field's metadata (meaning, unit, range) is the only description of a parameter: it validates the
value here, and it becomes the ROS parameter's descriptor in `ros/params.py`. `config_files.py`
fills the dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from specprune_ros.errors import ConfigError
from specprune_ros.types import ActionSpace

MIN_QUERY_RATE_HZ = 0.05  # that is not 0


def setting(
    default: object,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str | int, ...] = (),
    unit: str = '',
    live: bool = False,
) -> typing.Any:
    """A documented, validated dataclass field.

    Args:
        default: value when nothing sets it.
        doc: meaning, one sentence.
        low, high: inclusive range; for a tuple, of every element.
        choices: allowed values; empty for any.
        unit: 's', 'Hz', '1', ...
        live: may change while the node is active.
    """
    metadata = {
        'doc': doc, 'low': low, 'high': high, 'choices': choices, 'unit': unit, 'live': live,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RobotConfig:
    """What the robot has: cameras, joints, and the actions it takes."""

    camera_names: tuple[str, ...] = setting(
        ('wrist', 'side', 'overhead'), 'camera names, in the order in which the model takes them'
    )
    camera_topics: tuple[str, ...] = setting(
        (),
        'image topic of each camera, without the transport; empty: cameras/<name>/image_raw',
    )
    camera_transports: tuple[str, ...] = setting(
        ('raw',), 'image transport, one for all cameras or one each', choices=('raw', 'compressed')
    )
    camera_rotations: tuple[int, ...] = setting(
        (0,),
        'degrees by which an image is turned before the model sees it (a camera mounted upside '
        'down, LIBERO), one for all cameras or one each',
        choices=(0, 180), unit='deg',
    )  # fmt: skip
    source_size: int = setting(
        0,
        'side of the square to which every image is shrunk first, where the training data were '
        '(ALOHA: 256); 0: not',
        low=0, high=4096, unit='px',
    )  # fmt: skip
    joint_names: tuple[str, ...] = setting(
        (),
        'elements of the proprioceptive state, in model order: joints of joint_states, or of '
        'eef_pose eef_x, eef_y, eef_z (m), eef_ax, eef_ay, eef_az (axis-angle, rad); empty: no '
        'proprioception',
    )
    action_names: tuple[str, ...] = setting(
        ('x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper'), 'what each action element commands'
    )
    action_units: tuple[str, ...] = setting(
        ('1',), 'unit, one for all action elements or one each', choices=('1', 'm', 'rad')
    )
    action_space: str = setting(
        'eef_delta_pose',
        'what an action is',
        choices=tuple(space.name.lower() for space in ActionSpace),
    )
    action_min: tuple[float, ...] = setting(
        (-1.0,), 'least value, one for all action elements or one each; lower ones are clamped'
    )
    action_max: tuple[float, ...] = setting(
        (1.0,), 'greatest value, one for all action elements or one each; higher are clamped'
    )
    normalization: str = setting(
        'bounds_q99',
        'which dataset statistics -1 and 1 stand for: q01 and q99, or min and max',
        choices=('bounds_q99', 'bounds'),
    )
    gripper: str = setting(
        'unchanged',
        "what becomes of the model's gripper element, 0..1 with 1 = open: nothing; -1 open and +1 "
        'close (LIBERO); -1 close and +1 open',
        choices=('unchanged', 'close_positive', 'open_positive'),
    )
    gripper_names: tuple[str, ...] = setting(
        ('gripper',), 'action elements that are grippers, for `gripper`'
    )
    horizon: int = setting(8, 'steps in an action chunk', low=1, high=200)
    step_dt_s: float = setting(0.05, 'control period', low=0.001, high=2.0, unit='s')
    frame_id: str = setting('base_link', 'frame of Cartesian actions')
    translation_names: tuple[str, ...] = setting(
        ('x', 'y', 'z'),
        'executed-action elements that are the translation, z up; empty, both: motion stays '
        'unknown, and every query prunes gently',
    )
    rotation_names: tuple[str, ...] = setting(
        ('roll', 'pitch', 'yaw'), 'executed-action elements that are the rotation'
    )
    translation_scale: float = setting(
        1.0, 'executed translation that counts as 1, a full command', low=1e-9, unit='action unit'
    )
    rotation_scale: float = setting(
        1.0, 'executed rotation that counts as 1, a full command', low=1e-9, unit='action unit'
    )

    def __post_init__(self) -> None:
        check_fields('robot', self)
        width = len(self.action_names)
        sizes = {
            'camera_transports': len(self.camera_names),
            'camera_rotations': len(self.camera_names),
            'action_units': width,
            'action_min': width,
            'action_max': width,
        }
        for name, count in sizes.items():
            if len(getattr(self, name)) not in (1, count):
                raise ConfigError(
                    f'robot.{name}', getattr(self, name), f'needs 1 or {count} elements'
                )
        if len(self.camera_topics) not in (0, len(self.camera_names)):
            raise ConfigError(
                'robot.camera_topics', self.camera_topics, 'needs one per camera, or none'
            )
        for name in ('camera_names', 'joint_names', 'action_names'):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ConfigError(f'robot.{name}', values, 'has a name twice')
        limits = zip(self.per_action('action_min'), self.per_action('action_max'), strict=True)
        if any(low > high for low, high in limits):
            raise ConfigError('robot.action_min', self.action_min, 'lies above robot.action_max')
        for name in ('translation_names', 'rotation_names'):
            if len(getattr(self, name)) != (3 if self.translation_names else 0):
                raise ConfigError(
                    f'robot.{name}', getattr(self, name), 'needs 3 names, or both lists none'
                )
        if not self.camera_names:
            raise ConfigError('robot.camera_names', self.camera_names, 'needs at least one camera')
        if width == 0:
            raise ConfigError('robot.action_names', self.action_names, 'needs at least one name')
        for name in self.camera_names:
            if not (name.isascii() and name.isidentifier()):
                raise ConfigError(
                    'robot.camera_names', name, 'must be letters, digits and _ (a topic name)'
                )

    @property
    def chunk_validity_s(self) -> float:
        """How long after its stamp a chunk has a row due, s: row i from i+1 to i+2 periods."""
        return (self.horizon + 1) * self.step_dt_s

    def image_topics(self) -> dict[str, str]:
        """Camera name -> its image topic, without the transport."""
        default = tuple(f'cameras/{name}/image_raw' for name in self.camera_names)
        return dict(zip(self.camera_names, self.camera_topics or default, strict=True))

    def per_camera(self, name: str) -> dict[str, str | int]:
        """Camera name -> its value of a field that holds one for all or one each."""
        values = getattr(self, name)
        values = values * len(self.camera_names) if len(values) == 1 else values
        return dict(zip(self.camera_names, values, strict=True))

    def per_action(self, name: str) -> tuple:
        """[A] values of a field that holds one for all action elements or one each."""
        values = getattr(self, name)
        return values * len(self.action_names) if len(values) == 1 else values


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model runs, and where."""

    name: str = setting('tiny', 'model, a key of specprune_ros.models.MODELS')
    checkpoint: str = setting(
        '', 'folder of the model, for all but tiny; shipped/NAME: one of this package'
    )
    base_checkpoint: str = setting(
        '', 'folder of the base model, for a checkpoint that holds only lora_adapter/'
    )
    device: str = setting('auto', "torch device; 'auto' is cuda where there is one, else cpu")
    dtype: str = setting(
        'auto',
        'number format of the weights; auto: bfloat16 on cuda, else float32',
        choices=('auto', 'float32', 'bfloat16', 'float16'),
    )
    unnorm_key: str = setting(
        '', 'dataset in dataset_statistics.json; empty: the only one that is there'
    )
    head: str = setting(
        'auto',
        'action head; auto: the one whose file is in the checkpoint, discrete without any',
        choices=('auto', 'l1', 'discrete', 'diffusion'),
    )
    diffusion_steps: int = setting(
        50, 'denoising steps of a diffusion head, one decoder pass each', low=1, high=50
    )
    preprocessing: str = setting(
        'auto',
        "exact: bit for bit the reference's, JPEG round trip included; fast: resize and crop in "
        'one step; auto: exact for a checkpoint, fast for the stand-in',
        choices=('auto', 'exact', 'fast'),
    )
    center_crop: bool = setting(
        True, 'the model sees the centre 0.9 of the image area, as after training with crops'
    )
    seed: int = setting(
        0, 'seed of the stand-in weights and of diffusion noise', low=0, high=2**31 - 1
    )
    threads: int = setting(0, 'CPU threads of torch; 0 leaves its default', low=0, high=256)
    cuda_graph: str = setting(
        'auto',
        'record a query of each kind once as a CUDA graph and replay it: auto where it can be; '
        'on: also say at load when it cannot; off',
        choices=('auto', 'on', 'off'),
    )
    fused: bool = setting(
        True, 'one projection for query, key and value of a decoder layer, and one for gate and up'
    )
    attention: str = setting(
        'sdpa',
        'sdpa: fused attention kernels in the decoder; eager: probabilities are formed, the '
        'baseline of many published speedups',
        choices=('sdpa', 'eager'),
    )
    compile: bool = setting(False, 'torch.compile the decoder layers; the first queries are slow')
    quantization: str = setting(
        'none',
        'number format of the matrix products of the decoder layers, weights and activations, by '
        'torchao: changes the actions; fp8 needs a GPU of compute capability 8.9 or more',
        choices=('none', 'int8', 'fp8'),
    )

    def __post_init__(self) -> None:
        check_fields('model', self)
        if self.quantization != 'none' and not self.fused:
            raise ConfigError('model.quantization', self.quantization, 'needs model.fused')


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How visual tokens are pruned. Defaults are the SpecPrune-VLA paper's (v3).

    Layers are numbered from 1 in a decoder of 32 layers, as in the paper, and scaled in
    proportion for a decoder of another depth.
    """

    method: str = setting('specprune', 'method, a key of specprune_ros.pruning.METHODS', live=True)
    alpha: float = setting(
        0.8,
        'scales all K; smaller prunes more (paper 7.3)',
        low=0.1,
        high=2.0,
        unit='1',
        live=True,
    )
    budget: str = setting(
        'auto',
        'union: the size follows the data (the paper); fixed: an exact count per camera and mode; '
        'auto: fixed on cuda, union elsewhere',
        choices=('auto', 'union', 'fixed'),
    )
    k_global: int = setting(30, 'K_global per camera and layer', low=0, high=4096)
    k_local_coarse: int = setting(24, 'K_local in coarse mode', low=0, high=4096)
    k_local_fine: int = setting(40, 'K_local in fine mode', low=0, high=4096)
    k_dynamic_coarse: int = setting(20, 'K_dynamic in coarse mode', low=0, high=4096)
    k_dynamic_fine: int = setting(10, 'K_dynamic in fine mode', low=0, high=4096)
    similarity_threshold: float = setting(
        0.95,
        'tau: a patch less similar than this to its reference counts as changed; the paper takes '
        '0.95 in simulation, 0.8 on a real robot',
        low=-1.0, high=1.0, unit='1', live=True,
    )  # fmt: skip
    score_direction: str = setting(
        'text_to_image',
        'whose attention scores a patch: text queries on image keys, or image queries on text '
        'keys (Eq. 2; always 0 in a causal model)',
        choices=('text_to_image', 'image_to_text'),
    )
    score_text: str = setting(
        'instruction', 'text tokens that score patches', choices=('instruction', 'prompt')
    )
    global_fusion: str = setting(
        'union',
        'V_global: union of the top K of each global layer, or top K of their mean score',
        choices=('union', 'mean'),
    )
    global_layers: tuple[int, ...] = setting(
        (15, 32), 'layers whose scores make V_global of the next query', low=1, high=32
    )
    prune_layers: tuple[int, ...] = setting(
        (10, 15, 20, 25), 'layers after which tokens are pruned again', low=1, high=32
    )
    update_layers: tuple[int, ...] = setting(
        (),
        'layers that update the scores of later pruning; empty: all after the static one that do '
        'not prune themselves (Alg. 1); fewer are faster',
        low=1, high=32,
    )  # fmt: skip
    layer_keep_ratio: float = setting(
        0.9, 'gamma: share of visual tokens that a prune layer keeps', low=0.05, high=1.0, unit='1'
    )
    rank_slope: float = setting(0.1, 'k of the rank weight sigma(-k rank), Eq. 6', low=1e-6)
    rank_base: int = setting(0, 'rank of the best token in Eq. 6', low=0, high=1)
    layer_weight: str = setting(
        'entropy',
        'confidence of a layer in the scores: 1 / attention entropy (Eq. 8), or the same for all',
        choices=('entropy', 'average'),
    )
    ema_rate: float = setting(0.2, 'beta, update rate of the scores, Eq. 9', low=0.0, high=1.0)
    translation_threshold: float = setting(
        0.5, 'v_t below which motion can be fine', low=0.0, unit='1', live=True
    )
    rotation_threshold: float = setting(
        0.2, 'v_r below which motion can be fine', low=0.0, unit='1', live=True
    )
    hysteresis: bool = setting(
        True,
        'true: leave fine mode only above a threshold (paper 6.2); false: decide every step anew '
        '(Alg. 1)',
    )
    controller: bool = setting(
        True, 'false: every query prunes as in coarse motion, whatever moves (Fig. 8)'
    )
    static: bool = setting(True, 'false: no static pruning after layer 2 (Fig. 8)')
    dynamic: bool = setting(True, 'false: no pruning at `prune_layers` (Fig. 8)')
    replan_on_fine: bool = setting(
        False,
        'query again at once when motion turns fine within a chunk; the paper is silent, and it '
        'changes the query rate',
    )
    seed: int = setting(0, 'of what the method `random` draws', low=0, high=2**31 - 1)
    dense_every: int = setting(
        0, 'compute every n-th query of an episode dense; 0: only the first', low=0, high=10**6
    )
    keep_floor: float = setting(
        0.02,
        'a query that would keep less than this share of all patches runs dense instead',
        low=0.0, high=1.0, unit='1',
    )  # fmt: skip
    guard_every: int = setting(
        0,
        'every n-th query is also computed dense and compared, and its dense actions are used; '
        '0: no guard',
        low=0, high=10**6,
    )  # fmt: skip
    guard_disagreement: float = setting(
        0.05,
        'mean absolute difference of pruned and dense normalised actions above which the guard '
        'relaxes pruning',
        low=0.0, unit='1', live=True,
    )  # fmt: skip
    guard_recall: float = setting(
        0.5,
        "share of the dense query's important patches that pruning kept to the end, below which "
        'the guard relaxes pruning',
        low=0.0, high=1.0, unit='1', live=True,
    )  # fmt: skip
    guard_step: float = setting(
        0.1, 'by how much the guard raises alpha at a time', low=0.01, high=1.0, unit='1'
    )
    guard_alpha: float = setting(
        1.5,
        'highest alpha of the guard; when that does not help either, queries run dense until a '
        'comparison passes',
        low=0.1, high=4.0, unit='1',
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields('pruning', self)
        for name in ('global_layers', 'prune_layers', 'update_layers'):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ConfigError(f'pruning.{name}', values, 'must ascend, each layer once')
        if not self.global_layers:
            raise ConfigError('pruning.global_layers', self.global_layers, 'needs a layer')


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """When the node infers, and what it refuses."""

    query_rate_hz: float = setting(
        0.0,
        'inferences per second at most; 0: two per chunk, so that the next one comes before the '
        'rows of the last one end',
        low=0.0, high=200.0, unit='Hz',
    )  # fmt: skip
    max_image_age_s: float = setting(
        0.5, 'an image older than this is stale: no inference', low=0.01, high=60.0, unit='s'
    )
    max_joint_age_s: float = setting(
        0.5,
        'a joint state or end-effector pose older than this is stale',
        low=0.01, high=60.0, unit='s',
    )  # fmt: skip
    max_result_age_s: float = setting(
        2.0,
        'a chunk is discarded when its observation is older than this by then',
        low=0.01, high=60.0, unit='s',
    )  # fmt: skip
    max_gap_s: float = setting(
        10.0,
        'an observation this much later than the last one starts a new episode: what was pruned '
        'before says little by then',
        low=0.1, high=3600.0, unit='s',
    )  # fmt: skip
    task_timeout_s: float = setting(
        300.0,
        'a task ends after so long unless its goal says otherwise; 0: never. A task from '
        '~/instruction has no end',
        low=0.0, high=86400.0, unit='s',
    )  # fmt: skip
    input_timeout_s: float = setting(
        5.0,
        'a task ends when an input is missing or stale for so long; one from ~/instruction waits',
        low=0.1, high=3600.0, unit='s',
    )  # fmt: skip
    max_failures: int = setting(
        5, 'failed inferences in a row after which a task ends', low=1, high=1000
    )
    inference_deadline_s: float = setting(
        10.0,
        'an inference that takes longer hangs: the task ends, and nothing runs until ~/reset',
        low=0.05, high=600.0, unit='s',
    )  # fmt: skip
    warm_up_queries: int = setting(2, 'inferences on grey images at configure', low=0, high=100)
    overlay_rate_hz: float = setting(
        10.0,
        'overlays per second and camera at most; 0: none',
        low=0.0, high=60.0, unit='Hz', live=True,
    )  # fmt: skip
    overlay_opacity: float = setting(
        0.45, 'how strongly the overlay colours patches', low=0.0, high=1.0, unit='1', live=True
    )
    dry_run: bool = setting(True, 'mark every chunk as not to be executed')

    def __post_init__(self) -> None:
        check_fields('runtime', self)
        if 0.0 < self.query_rate_hz < MIN_QUERY_RATE_HZ:
            why = f'must be 0, or at least {MIN_QUERY_RATE_HZ:g}'
            raise ConfigError('runtime.query_rate_hz', self.query_rate_hz, why)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """All axes together."""

    robot: RobotConfig = field(default_factory=RobotConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pruning: PruneConfig = field(default_factory=PruneConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def query_period_s(self) -> float:
        """Between two queries at least: of `runtime.query_rate_hz`, or half of a chunk, s."""
        if self.runtime.query_rate_hz:
            return 1.0 / self.runtime.query_rate_hz
        return math.ceil(self.robot.horizon / 2) * self.robot.step_dt_s


def axes_of(kind: type) -> dict[str, type]:
    """Axis name -> its dataclass, of PolicyConfig or another node's configuration."""
    return typing.get_type_hints(kind)


AXES = axes_of(PolicyConfig)


def check_fields(axis: str, config: object) -> None:
    """Check every field of a config dataclass against its type and metadata.

    Raises:
        ConfigError: naming the field and the value.
    """
    hints = typing.get_type_hints(type(config))
    for spec in dataclasses.fields(config):
        value, name = getattr(config, spec.name), f'{axis}.{spec.name}'
        many = typing.get_origin(hints[spec.name]) is tuple
        kind = typing.get_args(hints[spec.name])[0] if many else hints[spec.name]
        if many and not isinstance(value, tuple):
            raise ConfigError(name, value, f'must be a list of {kind.__name__}')
        for element in value if many else (value,):
            _check_element(name, element, kind, spec.metadata)


def _check_element(name: str, value: object, kind: type, limits: Mapping) -> None:
    if kind is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not right:
        raise ConfigError(name, value, f'must be of type {kind.__name__}')
    if limits['choices'] and value not in limits['choices']:
        raise ConfigError(name, value, f'must be one of {", ".join(map(str, limits["choices"]))}')
    if kind in (int, float):
        if not math.isfinite(value):
            raise ConfigError(name, value, 'must be finite')
        low = -math.inf if limits['low'] is None else limits['low']
        high = math.inf if limits['high'] is None else limits['high']
        if not low <= value <= high:
            raise ConfigError(name, value, f'must lie in [{low:g}, {high:g}]')
