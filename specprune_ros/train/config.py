"""Settings of a training run; `config/train/*.yaml` sets them."""

from __future__ import annotations

from dataclasses import dataclass, field

from specprune_ros.config import check_fields, setting
from specprune_ros.errors import ConfigError

PATCH = 14  # px, of both towers
PRECISIONS = ('float32', 'bfloat16')


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from."""

    demos: tuple[str, ...] = setting((), 'folders of demonstrations, from `specprune collect`')
    layouts: tuple[str, ...] = setting(
        (), 'folders of still scenes, from `specprune collect --layouts` and `--rollouts`'
    )
    gate: str = setting('', 'folder of held-out still scenes')
    tasks: tuple[str, ...] = setting(
        ('object_shuffled/0', 'object_shuffled/1', 'object_shuffled/2', 'object_shuffled/3'),
        'tasks to learn, by name',
    )
    proprio: tuple[str, ...] = setting(
        (
            'eef_x', 'eef_y', 'eef_z', 'eef_ax', 'eef_ay', 'eef_az',
            'panda_finger_joint1', 'panda_finger_joint2',
        ),
        'elements of the proprioception, in the order in which the model takes them',
    )  # fmt: skip
    horizon: int = setting(8, 'actions of a chunk', low=1)
    withheld: str = setting(
        'nothing',
        'what the network is not given, for controls that show what is needed',
        choices=('nothing', 'images', 'instruction'),
    )

    def __post_init__(self) -> None:
        check_fields('data', self)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes; whatever else OpenVLA-OFT's layout fixes is fixed."""

    image_size: int = setting(112, 'side of an image', low=PATCH, high=224, unit='px')
    dino_width: int = setting(128, 'width of the DINOv2-like tower', low=4)
    dino_depth: int = setting(4, 'its blocks; the last one is never run', low=2)
    siglip_width: int = setting(64, 'width of the SigLIP-like tower', low=4)
    siglip_depth: int = setting(3, 'its blocks; the last one is never run', low=2)
    tower_heads: int = setting(4, 'attention heads of both towers', low=1)
    width: int = setting(128, 'width of the language model', low=8)
    mlp_width: int = setting(256, 'inner width of its MLPs', low=8)
    layers: int = setting(8, 'its decoder layers', low=1)
    heads: int = setting(4, 'its attention heads', low=1)
    vocabulary: int = setting(512, 'its embeddings', low=300)

    def __post_init__(self) -> None:
        check_fields('network', self)
        if self.image_size % PATCH:
            raise ConfigError('network.image_size', self.image_size, f'no multiple of {PATCH}')
        if self.width % (2 * self.heads):
            raise ConfigError('network.heads', self.heads, 'width / heads must be even')
        for name in ('dino_width', 'siglip_width'):
            if getattr(self, name) % self.tower_heads:
                raise ConfigError('network.tower_heads', self.tower_heads, f'must divide {name}')


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How it is learnt."""

    steps: int = setting(12000, 'optimiser steps in all', low=1)
    vision_steps: int = setting(
        1000, 'of them, first, with the towers and the projector alone', low=0
    )
    seed: int = setting(0, 'of weights, batches and augmentation', low=0)
    layout_images: int = setting(10, 'still scenes of a batch', low=1)
    layout_instructions: int = setting(2, 'instructions per still scene', low=1)
    demo_frames: int = setting(12, 'demonstration frames of a batch', low=0)
    optimizer: str = setting(
        'adamw',
        "'adamw', or 'muon', which takes the matrices of all layers and learns in fewer steps",
        choices=('adamw', 'muon'),
    )
    precision: str = setting(
        'float32',
        'of products in forward and backward; weights are always float32',
        choices=PRECISIONS,
    )
    rate: float = setting(1e-3, 'peak learning rate', low=0.0)
    final_rate: float = setting(0.05, 'share of the learning rate at the end', low=0.0, high=1.0)
    warm_up: int = setting(100, 'steps over which the learning rate rises', low=1)
    weight_decay: float = setting(0.02, 'of matrices', low=0.0)
    clip: float = setting(1.0, 'largest norm of the gradient', low=0.0)
    average: float = setting(0.999, 'decay of the averaged weights', low=0.0, high=0.99999)
    shift_px: int = setting(1, 'images are shifted by this much at most', low=0, unit='px')
    colour: float = setting(0.15, 'brightness and contrast vary by this share', low=0.0, high=0.9)
    token_dropout: float = setting(
        0.0,
        'largest share of the visual tokens that a sequence goes without, drawn for every step: '
        'what a small network otherwise never sees, and a large one copes with',
        low=0.0,
        high=0.95,
    )
    token_spared: float = setting(
        0.0,
        'chance that a patch which shows the named object goes last, drawn for each of them in '
        'every step: at 1 all others are missing first',
        low=0.0,
        high=1.0,
    )
    target_weight: float = setting(1.0, 'weight of the named object, where it is', low=0.0)
    flag_weight: float = setting(1.0, 'weight of the named object, in which patches', low=0.0)
    patch_weight: float = setting(0.3, 'weight of which object is in a patch', low=0.0)
    words_weight: float = setting(
        0.0,
        "weight of the prompt's attention in the first two layers, of which static pruning takes "
        "the instruction's: how much of what a camera gets goes to the named object",
        low=0.0,
    )
    device: str = setting('cpu', "'cpu', 'cuda', or auto: cuda where there is one")
    threads: int = setting(1, 'threads of torch', low=1)
    gate_every: int = setting(250, 'steps between measurements on held-out scenes', low=1)
    gate_scenes: int = setting(200, 'held-out scenes of a measurement', low=1)
    keep: tuple[int, ...] = setting(
        (),
        'steps whose network is written as well, as a checkpoint folder beside the last one',
        low=1,
    )
    save_every_s: float = setting(300.0, 'between checkpoints', low=0.0, unit='s')

    def __post_init__(self) -> None:
        check_fields('fit', self)
        if self.token_spared and not self.token_dropout:
            raise ConfigError('fit.token_spared', self.token_spared, 'needs fit.token_dropout')
        for step in self.keep:
            if step % self.gate_every:
                why = f'{step} is no multiple of fit.gate_every = {self.gate_every}'
                raise ConfigError('fit.keep', self.keep, why)
            if not self.vision_steps < step < self.steps:
                why = f'{step} is not between fit.vision_steps and fit.steps'
                raise ConfigError('fit.keep', self.keep, why)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.data.withheld != 'nothing' and self.fit.token_spared:
            why = f'which patches are there tells the object, data.withheld = {self.data.withheld}'
            raise ConfigError('fit.token_spared', self.fit.token_spared, why)
