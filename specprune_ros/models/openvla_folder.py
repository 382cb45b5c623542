"""What an OpenVLA-OFT, OpenVLA or UniVLA checkpoint folder holds, by headers and small files.

Source: openvla-oft 213c5ff, openvla_utils.py; for UniVLA see heads/latent.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from specprune_ros.errors import CheckpointError, ConfigError, shown
from specprune_ros.models.checkpoint import Checkpoint, Weight, Weights, open_weights
from specprune_ros.models.heads.latent import ACTION_DIM
from specprune_ros.models.openvla_oft import (
    BOUNDS_EPS,
    DINO_MEAN,
    DINO_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    Bounds,
)
from specprune_ros.models.vit import TowerConfig

# Fields of config.json that change what is computed, and the values that are implemented; a
# missing field has the first one.
FIXED: dict[str, tuple] = {
    'vision_backbone_id': ('dinosiglip-vit-so-224px',),
    'model_type': ('openvla',),
    'use_fused_vision_backbone': (True,),
    'image_resize_strategy': ('resize-naive',),
    'arch_specifier': ('no-align+fused-gelu-mlp',),
}
FIXED_TEXT: dict[str, tuple] = {
    'model_type': ('llama',),
    'hidden_act': ('silu',),
    'rope_theta': (10000.0,),
    'rope_scaling': (None,),
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'tie_word_embeddings': (False,),
}
LLAMA_SIZES = (
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'num_key_value_heads',
    'max_position_embeddings',
    'vocab_size',
)
OVERRIDES = 'golden_tiny_vit_overrides'
MEANS, STDS = (DINO_MEAN, SIGLIP_MEAN), (DINO_STD, SIGLIP_STD)
DINO = TowerConfig(
    width=1024, depth=24, heads=16, mlp_width=4096, registers=4, layer_scale=True
)  # ViT-L/14 with registers
SIGLIP = TowerConfig(
    width=1152, depth=27, heads=16, mlp_width=4304, registers=None, layer_scale=False
)  # SO400M/14
IMAGE_SIZES = [224, 224]  # px, of every published checkpoint
MLP_RATIOS = (4.0, 3.7362)  # of the two towers, where a config gives other widths
# What a config.json leaves out of text_config (trap 3: the epsilon is not Llama-2's).
LLAMA_7B = {
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 32,
    'hidden_act': 'silu',
    'max_position_embeddings': 2048,
    'rms_norm_eps': 1e-6,
    'vocab_size': 32064,
    'pad_token_id': None,
}
# UniVLA's component has a name without the word by which the others are found.
ACTION_DECODER = 'action_decoder'
ACTION_DECODER_PARTS = ('latent_action_pool', 'visual_pool', 'proj')


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What sets one of the models that share this folder layout apart.

    Attributes:
        title: what people call it.
        files: components that its folder may hold beside the language model and the towers.
        head: its only action head; 'auto': as model.head says.
        cameras: most of them.
        horizon: its only chunk length; None: as the robot or the action head says.
        causal: tokens see earlier ones only and the head goes on token by token; otherwise all
            see each other, and the sequence ends in placeholders for the whole chunk.
        bounds_eps: see Bounds.
        skip_at_size: see ExactPreprocessor.
    """

    title: str
    files: tuple[str, ...]
    head: str
    cameras: int
    horizon: int | None
    causal: bool
    bounds_eps: float
    skip_at_size: bool


VARIANTS = {
    'openvla_oft': Variant(
        title='OpenVLA-OFT',
        files=('action_head', 'proprio_projector', 'noisy_action_projector', 'vision_backbone'),
        head='auto',
        cameras=4,
        horizon=None,
        causal=False,
        bounds_eps=BOUNDS_EPS,
        skip_at_size=True,
    ),
    'openvla': Variant(
        title='OpenVLA',
        files=(),
        head='discrete',
        cameras=1,
        horizon=1,
        causal=True,
        bounds_eps=0.0,
        skip_at_size=False,
    ),
    'univla': Variant(
        title='UniVLA',
        files=(ACTION_DECODER,),
        head='latent',
        cameras=1,
        horizon=None,
        causal=True,
        bounds_eps=0.0,
        skip_at_size=False,
    ),
}


@dataclass(frozen=True, eq=False)
class Folder:
    """What a checkpoint folder holds; reads headers and small files only.

    Raises:
        CheckpointError: from any member, when the folder is broken or of another architecture.
    """

    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Read and check config.json."""
        folder = cls(Checkpoint(path))
        folder._check_config()
        return folder

    def _check_config(self) -> None:
        """Refuse what would be computed wrongly if it were passed over."""
        config = self.checkpoint.config
        self._check_fixed('', config, FIXED)
        text = config.get('text_config', {})
        if not isinstance(text, dict):
            raise self._bad('text_config', text, 'must be a JSON object')
        self._check_fixed('text_config.', text, FIXED_TEXT)
        for name in LLAMA_SIZES:
            if type(self.llama[name]) is not int or self.llama[name] < 1:
                raise self._bad(f'text_config.{name}', self.llama[name], 'must be above 0')
        llama = self.llama
        heads = llama['num_attention_heads']
        if llama['hidden_size'] % (2 * heads) or heads % llama['num_key_value_heads']:
            raise self._bad('text_config.num_attention_heads', heads, 'does not fit hidden_size')
        for name, least in (('n_action_bins', 2), ('pad_to_multiple_of', 0)):
            value = config.get(name, least)
            if type(value) is not int or not least <= value < llama['vocab_size']:
                raise self._bad(name, value, f'must be a whole number from {least} on')
        self._check_overrides(config.get(OVERRIDES))
        self._check_image_sizes(config.get('image_sizes', IMAGE_SIZES))
        self._check_means(self.checkpoint.json('preprocessor_config.json') or {})

    def _check_fixed(self, prefix: str, values: dict, known: dict[str, tuple]) -> None:
        for name, allowed in known.items():
            value = values.get(name, allowed[0])
            if value not in allowed:
                raise self._bad(f'{prefix}{name}', value, f'only {allowed[0]!r} is known here')

    def _check_overrides(self, sizes: object) -> None:
        """Sizes of the towers where they are not the published ones (reference vectors)."""
        if sizes is None:
            return
        names = ('embed_dim', 'depth', 'num_heads')
        try:
            values = [size[name] for size in sizes for name in names]
        except (KeyError, TypeError):
            values = []
        if len(values) != 6 or not all(type(value) is int and value > 0 for value in values):
            raise self._bad(OVERRIDES, sizes, f'needs {", ".join(names)} for two towers')

    def _check_image_sizes(self, sizes: object) -> None:
        """One size for both towers, in whole patches."""
        try:
            one, other = sizes
        except (TypeError, ValueError):
            one = other = None
        if type(one) is not int or one != other or one < 1 or one % DINO.patch_size:
            raise self._bad(
                'image_sizes', sizes, f'must be [n, n], n a multiple of {DINO.patch_size}'
            )

    def _check_means(self, preprocessor: dict) -> None:
        """The towers' normalisation is part of the architecture here."""
        for name, ours in (('means', MEANS), ('stds', STDS)):
            theirs = preprocessor.get(name, ours)
            try:
                same = np.allclose(np.asarray(theirs, np.float64), ours, atol=1e-4)
            except (TypeError, ValueError):
                same = False
            if not same:
                raise CheckpointError(
                    f'{self.path / "preprocessor_config.json"}: {name} = {shown(theirs)}: only '
                    f'{ours} is known here'
                )

    def _bad(self, field: str, value: object, why: str) -> CheckpointError:
        return CheckpointError(f'{self.path / "config.json"}: {field} = {shown(value)}: {why}')

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.checkpoint.folder

    @cached_property
    def llama(self) -> dict:
        """Arguments of transformers.LlamaConfig."""
        text = self.checkpoint.config.get('text_config', {})
        return {name: text.get(name, default) for name, default in LLAMA_7B.items()}

    @property
    def width(self) -> int:
        """C of the language model."""
        return self.llama['hidden_size']

    @property
    def film(self) -> bool:
        """Whether language modulates the vision towers."""
        return self.component('vision_backbone') is not None

    @cached_property
    def towers(self) -> tuple[TowerConfig, TowerConfig]:
        """DINOv2's and SigLIP's sizes."""
        common = {
            'film_width': self.width if self.film else None,
            'image_size': self.checkpoint.config.get('image_sizes', IMAGE_SIZES)[0],
        }
        towers = (replace(DINO, **common), replace(SIGLIP, **common))
        sizes = self.checkpoint.config.get(OVERRIDES)
        if sizes is None:
            return towers
        dino, siglip = (
            replace(
                tower,
                width=size['embed_dim'],
                depth=size['depth'],
                heads=size['num_heads'],
                mlp_width=int(size['embed_dim'] * ratio),
            )
            for tower, size, ratio in zip(towers, sizes, MLP_RATIOS, strict=True)
        )
        return dino, siglip

    @cached_property
    def action_head(self) -> Weights | None:
        """The action head's weights; None without its file."""
        return self._component('action_head')

    @cached_property
    def proprio_projector(self) -> Weights | None:
        """The proprio projector's weights; None without its file."""
        return self._component('proprio_projector')

    @cached_property
    def noisy_action_projector(self) -> Weights | None:
        """The noisy-action projector's weights; None without its file."""
        return self._component('noisy_action_projector')

    @cached_property
    def action_decoder(self) -> Weights | None:
        """The weights of UniVLA's action decoder; None without its file.

        Raises:
            CheckpointError: the decoder of a real robot or of R2R, which are built otherwise.
        """
        weights = self._component(ACTION_DECODER)
        parts = sorted({key.split('.')[0] for key in weights or ()})
        if not set(parts) <= set(ACTION_DECODER_PARTS):
            raise CheckpointError(
                f'{self.component(ACTION_DECODER)}: consists of {", ".join(parts)}; only decoders '
                f'of {", ".join(ACTION_DECODER_PARTS)} are known here (LIBERO, CALVIN, Bridge), '
                'not those of real robots or of R2R'
            )
        return weights

    @cached_property
    def head(self) -> str:
        """Which action head the files hold.

        'latent' with UniVLA's action decoder, 'l1' or 'diffusion' by the action head's keys,
        'discrete' with neither file.
        """
        if self.component(ACTION_DECODER) is not None:
            return 'latent'
        if self.action_head is None:
            return 'discrete'
        if any(key.startswith('noise_predictor.') for key in self.action_head):
            return 'diffusion'
        return 'l1'

    @cached_property
    def head_network(self) -> Weights:
        """The action head's MLP, keys without their prefix."""
        prefix = {'l1': 'model.', 'diffusion': 'noise_predictor.mlp_resnet.'}[self.head]
        return {key.removeprefix(prefix): value for key, value in self.action_head.items()}

    @property
    def action_dim(self) -> int | None:
        """A, as far as the files tell."""
        if self.head == 'discrete':
            return None
        if self.head == 'latent':
            return ACTION_DIM
        return self._needed(self.head_network, 'fc2.weight').shape[0]

    @property
    def horizon(self) -> int | None:
        """L, as far as the files tell."""
        if self.head != 'latent':
            return None
        weight = self._needed(self.action_decoder, 'proj.0.weight')
        rows = weight.shape[0]
        if rows % ACTION_DIM:
            raise CheckpointError(
                f'{weight.file}: {weight.key} has {rows} rows, no multiple of the {ACTION_DIM} '
                'elements of an action'
            )
        return rows // ACTION_DIM

    @property
    def head_width(self) -> int:
        """Width of the action head's MLP."""
        return self._needed(self.head_network, 'fc1.weight').shape[0]

    @property
    def proprio_dim(self) -> int | None:
        """P; None without a proprio projector."""
        if self.proprio_projector is None:
            return None
        return self._needed(self.proprio_projector, 'fc1.weight').shape[1]

    def component(self, name: str) -> Path | None:
        """A component's one file, None without.

        UniVLA publishes its decoder as `action_decoder.pt` and trains it as
        `action_decoder-{step}.pt`; for all else see `Checkpoint.component`.

        Raises:
            CheckpointError: several files match.
        """
        if name != ACTION_DECODER:
            return self.checkpoint.component(name)
        matches = sorted(self.path.glob(f'{ACTION_DECODER}*.pt'))
        if len(matches) > 1:
            names = ', '.join(path.name for path in matches)
            raise CheckpointError(
                f'{self.path}: {len(matches)} files for {name} ({names}); keep one of them here'
            )
        return matches[0] if matches else None

    def _component(self, name: str) -> Weights | None:
        path = self.component(name)
        return None if path is None else open_weights(path)

    def _needed(self, weights: Weights, key: str) -> Weight:
        """A matrix whose shape tells a size."""
        if key not in weights or len(weights[key].shape) != 2:
            file = next(iter(weights.values())).file
            raise CheckpointError(f'{file}: lacks the matrix {key}; has {sorted(weights)[:4]} ...')
        return weights[key]

    def statistics(self, unnorm_key: str = '') -> tuple[str, dict]:
        """A dataset's name and statistics.

        Args:
            unnorm_key: its name, with or without '_no_noops'; '' takes the only one.

        Raises:
            ConfigError: no such dataset, or several and none was named.
        """
        datasets = self.checkpoint.statistics()
        for name in (unnorm_key, f'{unnorm_key}_no_noops'):
            if name in datasets:
                return name, datasets[name]
        if not unnorm_key and len(datasets) == 1:
            return next(iter(datasets.items()))
        why = f'must be one of {", ".join(sorted(datasets)) or "(none there)"}'
        raise ConfigError('model.unnorm_key', unnorm_key, f'{self.path}: {why}')

    def bounds(self, kind: str, normalization: str, unnorm_key: str) -> Bounds:
        """Normalisation of 'action' or 'proprio'; see RobotConfig.normalization.

        Raises:
            CheckpointError: the statistics lack it, or are no numbers.
            ConfigError: see `statistics`.
        """
        name, statistics = self.statistics(unnorm_key)
        low, high = {'bounds_q99': ('q01', 'q99'), 'bounds': ('min', 'max')}[normalization]
        try:
            values = statistics[kind]
            arrays = [np.asarray(values[key], np.float64) for key in (low, high)]
            mask = np.asarray(values.get('mask', np.ones(len(arrays[0]), bool)))
            if mask.dtype != bool:
                raise ValueError(f'mask holds {mask.dtype}, not true and false')
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'{self.path}: statistics of {name}: {kind} lacks {low} or {high} ({error!r})'
            ) from error
        if not all(a.shape == mask.shape and np.isfinite(a).all() for a in arrays):
            raise CheckpointError(
                f'{self.path}: statistics of {name}: {kind}.{low}, {high} and mask must be finite '
                f'and of one length, got {[a.shape for a in (*arrays, mask)]}'
            )
        return Bounds(*arrays, mask)
