"""An OpenVLA-OFT, OpenVLA or UniVLA model from a published checkpoint folder.

No code from the folder is ever run. Everything that can be wrong with it is found before the
weights are read.

Source: openvla-oft 213c5ff, openvla_utils.py; for UniVLA see heads/latent.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from specprune_ros.config import PolicyConfig, RobotConfig
from specprune_ros.errors import CheckpointError, ConfigError
from specprune_ros.models.base import ActionHead, ModelInfo
from specprune_ros.models.checkpoint import (
    Checkpoint,
    Weights,
    check_weights,
    load_weights,
    open_weights,
)
from specprune_ros.models.heads.diffusion import DiffusionHead, NoisyActionProjector
from specprune_ros.models.heads.l1 import L1RegressionHead
from specprune_ros.models.heads.latent import (
    LATENT_TOKENS,
    ActionDecoder,
    LatentActionHead,
)
from specprune_ros.models.heads.tokens import ActionTokens, GreedyTokensHead, ParallelTokensHead
from specprune_ros.models.llama import make_llama
from specprune_ros.models.lora import Adapter, merge_wrapped
from specprune_ros.models.openvla_folder import ACTION_DECODER, VARIANTS, Folder
from specprune_ros.models.openvla_oft import (
    Bounds,
    OpenVLAOFT,
    OpenVLAParts,
    Projector,
    ProprioProjector,
    VisionBackbone,
)
from specprune_ros.models.preprocess import Preprocessor, make_preprocessor
from specprune_ros.models.prompt import Tokenizer
from specprune_ros.models.tokenizer import LlamaTokenizer

MIN_PROMPT = 32  # tokens that a prompt needs at the least, for a short instruction
# Weights that model.safetensors holds and inference never reads: towers end before their norm.
UNUSED = (
    'vision_backbone.featurizer.norm.',
    'vision_backbone.fused_featurizer.norm.',
    'vision_backbone.fused_featurizer.attn_pool.',
)
LM_HEAD, TOWERS = 'language_model.lm_head.', 'vision_backbone.'
TOKEN_HEADS = ('discrete', 'latent')  # that need the language-model head
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class Skeleton(nn.Module):
    """The modules of model.safetensors, under its key names, on the meta device.

    Args:
        folder: whose sizes to take.
        lm_head: whether the language-model head is needed.
    """

    def __init__(self, folder: Folder, *, lm_head: bool):
        super().__init__()
        dino, siglip = folder.towers
        with torch.device('meta'):
            self.vision_backbone = VisionBackbone(dino, siglip)
            self.projector = Projector(dino.width + siglip.width, folder.width)
            self.language_model = nn.Module()
            self.language_model.model = make_llama(folder.llama)
            if lm_head:
                vocabulary = folder.llama['vocab_size']
                self.language_model.lm_head = nn.Linear(folder.width, vocabulary, bias=False)
        # What no checkpoint holds.
        self.vision_backbone.make_buffers()
        llama = self.language_model.model
        llama.rotary_emb = type(llama.rotary_emb)(config=llama.config)


def load(
    config: PolicyConfig, device: torch.device, tokenizer: Tokenizer | None = None
) -> OpenVLAOFT:
    """Load the configured checkpoint.

    Args:
        config: `model.checkpoint` is the folder, `model.name` one of VARIANTS.
        device: where the model goes.
        tokenizer: instead of the folder's own.

    Raises:
        ConfigError: the robot and the checkpoint do not fit.
        CheckpointError: files are missing, broken, or of another architecture.
        MissingDependencyError: a package is missing.
    """
    if not config.model.checkpoint:
        raise ConfigError('model.checkpoint', '', f'{config.model.name} needs its folder')
    if config.model.name not in VARIANTS:
        raise ConfigError('model.name', config.model.name, f'must be one of {", ".join(VARIANTS)}')
    folder = Folder.open(config.model.checkpoint)
    builder = _Builder(folder, config, device)
    builder.check_fit()
    return builder.build(tokenizer or LlamaTokenizer(folder.path, max_tokens=builder.prompt_room))


class _Builder:
    """Builds one model from a folder and a configuration."""

    def __init__(self, folder: Folder, config: PolicyConfig, device: torch.device):
        self.folder = folder
        self.config = config
        self.robot: RobotConfig = config.robot
        self.device = device
        self.variant = VARIANTS[config.model.name]
        wanted = config.model.dtype
        if wanted == 'auto':
            wanted = 'bfloat16' if device.type == 'cuda' else 'float32'
        self.dtype = DTYPES[wanted]
        self.head = config.model.head if self.variant.head == 'auto' else self.variant.head
        if self.head == 'auto':
            self.head = folder.head

    def check_fit(self) -> None:
        """Compare robot and folder, before any weight is read.

        Raises:
            ConfigError: naming the field that does not fit.
            CheckpointError: a file is missing, or its sizes are not the robot's.
        """
        self._check_files()
        self._check_head()
        self._check_robot()
        robot = self.robot
        if self.prompt_room < MIN_PROMPT:
            raise ConfigError(
                'robot.horizon',
                robot.horizon,
                f'with {len(robot.camera_names)} cameras and {len(robot.action_names)} action '
                f'elements the sequence leaves the {self.folder.llama["max_position_embeddings"]} '
                'positions of the model',
            )
        self._check_bounds('action', len(robot.action_names))
        if robot.joint_names:
            self._check_bounds('proprio', len(robot.joint_names))

    def _check_files(self) -> None:
        """A component of another model means that this is the other model."""
        variant = self.variant
        foreign = [
            (path, f'{other.title} ({name})')
            for name, other in VARIANTS.items()
            for file in other.files
            if file not in variant.files and (path := self.folder.component(file))
        ]
        if foreign:
            path, owner = foreign[0]
            raise ConfigError(
                'model.name',
                self.config.model.name,
                f'{path} belongs to {owner}, not to {variant.title}',
            )

    def _check_head(self) -> None:
        folder, wanted = self.folder, self.config.model.head
        if wanted not in ('auto', self.head):
            raise ConfigError('model.head', wanted, f'{self.variant.title} has no such head')
        if self.head == 'latent' and folder.action_decoder is None:
            raise CheckpointError(
                f'{folder.path}: no {ACTION_DECODER}.pt (or {ACTION_DECODER}-*.pt), which '
                f'{self.variant.title} needs; the pretrained model comes without'
            )
        if self.head not in ('discrete', folder.head):
            raise ConfigError(
                'model.head', self.head, f'{folder.path} holds {folder.head}, not this one'
            )
        if self.head == 'diffusion' and folder.noisy_action_projector is None:
            raise CheckpointError(
                f'{folder.path}: the diffusion head needs noisy_action_projector--*_checkpoint.pt'
            )

    def _check_robot(self) -> None:
        robot, folder, variant = self.robot, self.folder, self.variant
        if len(robot.camera_names) > variant.cameras:
            raise ConfigError(
                'robot.camera_names',
                robot.camera_names,
                f'{variant.title} takes {variant.cameras} at most',
            )
        horizon = variant.horizon or folder.horizon
        if horizon not in (None, robot.horizon):
            raise ConfigError(
                'robot.horizon', robot.horizon, f'the {variant.title} model gives {horizon}'
            )
        if self.head != 'discrete' and len(robot.action_names) != folder.action_dim:
            raise ConfigError(
                'robot.action_names',
                robot.action_names,
                f'the action head gives {folder.action_dim} elements',
            )
        proprio = folder.proprio_dim or 0
        if len(robot.joint_names) != proprio:
            raise ConfigError(
                'robot.joint_names',
                robot.joint_names,
                f'the checkpoint takes {proprio} elements of proprioception'
                + ('' if proprio else ' (no proprio_projector file)'),
            )

    @property
    def prompt_room(self) -> int:
        """Tokens that images, state and actions leave for the prompt."""
        robot, tower = self.robot, self.folder.towers[0]
        actions = robot.horizon * len(robot.action_names)
        taken = len(robot.camera_names) * tower.patches
        taken += LATENT_TOKENS if self.head == 'latent' else actions
        if not self.variant.causal:
            taken += bool(robot.joint_names) + (self.head == 'diffusion') + 1
        return self.folder.llama['max_position_embeddings'] - taken

    def _check_bounds(self, kind: str, size: int) -> None:
        bounds = self._bounds(kind)
        if len(bounds.mask) != size:
            raise CheckpointError(
                f'{self.folder.path}: statistics of {kind} have {len(bounds.mask)} elements, the '
                f'robot {size}'
            )

    def _bounds(self, kind: str) -> Bounds:
        bounds = self.folder.bounds(kind, self.robot.normalization, self.config.model.unnorm_key)
        return replace(bounds, eps=self.variant.bounds_eps)

    def build(self, tokenizer: Tokenizer) -> OpenVLAOFT:
        """Read the weights and put the model together."""
        preprocessor = self._preprocessor()
        skeleton = self._skeleton()
        action_head = self._action_head(skeleton.language_model)
        proprio_projector = self._proprio_projector()
        modules = [skeleton, action_head, *([proprio_projector] if proprio_projector else [])]
        parameters = {id(p): p.numel() for m in modules for p in m.parameters()}
        return OpenVLAOFT(
            OpenVLAParts(
                info=self._info(preprocessor.crop_side, sum(parameters.values())),
                preprocessor=preprocessor,
                vision_backbone=skeleton.vision_backbone,
                projector=skeleton.projector,
                language_model=skeleton.language_model.model,
                action_head=action_head,
                proprio_projector=proprio_projector,
                tokenizer=tokenizer,
                action_bounds=self._bounds('action'),
                proprio_bounds=self._bounds('proprio') if proprio_projector else None,
                causal=self.variant.causal,
                placeholders=not self.variant.causal,
                time_token=self.head == 'diffusion',
                film=self.folder.film,
            )
        )

    def _preprocessor(self) -> Preprocessor:
        mode, side = self.config.model.preprocessing, self.robot.source_size
        return make_preprocessor(
            'exact' if mode == 'auto' else mode,
            size=self._image_size,
            center_crop=self.config.model.center_crop,
            source_size=(side, side) if side else None,
            skip_at_size=self.variant.skip_at_size,
            device=self.device,
        )

    @property
    def _image_size(self) -> tuple[int, int]:
        side = self.folder.towers[0].image_size
        return side, side

    def _info(self, crop_side: float, parameters: int) -> ModelInfo:
        robot, tower = self.robot, self.folder.towers[0]
        side = tower.image_size // tower.patch_size
        return ModelInfo(
            name=f'{self.config.model.name} {self.folder.path.name}, {self.head} head',
            stand_in=False,
            cameras=robot.camera_names,
            image_size=self._image_size,
            crop_side=crop_side,
            grid=(side, side),
            proprio_dim=len(robot.joint_names),
            horizon=robot.horizon,
            action_dim=len(robot.action_names),
            parameters=parameters,
        )

    def _skeleton(self) -> Skeleton:
        lm_head = self.head in TOKEN_HEADS
        skeleton = Skeleton(self.folder, lm_head=lm_head)
        self._fill(skeleton, self._weights(), UNUSED if lm_head else (*UNUSED, LM_HEAD))
        return skeleton

    def _weights(self) -> Weights:
        """The whole model's; with FiLM its towers come from a file of their own."""
        checkpoint = self.folder.checkpoint
        if checkpoint.has_weights or checkpoint.lora_adapter is None:
            weights = checkpoint.weights()
        else:
            weights = self._adapted(Adapter.open(checkpoint.lora_adapter))
        path = self.folder.component('vision_backbone')
        if path is None:
            return weights
        rest = {key: weight for key, weight in weights.items() if not key.startswith(TOWERS)}
        towers = merge_wrapped(open_weights(path))
        return rest | {key.replace('.block.', '.'): weight for key, weight in towers.items()}

    def _adapted(self, adapter: Adapter) -> Weights:
        base = self.config.model.base_checkpoint
        if not base:
            raise ConfigError(
                'model.base_checkpoint',
                base,
                f'{self.folder.path} holds only lora_adapter/: name the folder of its base model',
            )
        return adapter.apply(Checkpoint(base).weights())

    def _fill(
        self,
        module: nn.Module,
        weights: Weights,
        unused: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or self.dtype
        load_weights(module, weights, device=self.device, dtype=dtype, unused=unused)
        module.eval().requires_grad_(False)

    def _action_head(self, language_model: nn.Module) -> ActionHead:
        if self.head == 'l1':
            return self._network()
        if self.head == 'diffusion':
            return self._diffusion_head()
        lm_head, embed_tokens = language_model.lm_head, language_model.model.embed_tokens
        if self.head == 'latent':
            return LatentActionHead(lm_head, embed_tokens, self._action_decoder())
        tokens, action_dim = self._action_tokens(), len(self.robot.action_names)
        if self.variant.causal:
            return GreedyTokensHead(lm_head, embed_tokens, tokens, action_dim)
        return ParallelTokensHead(lm_head, tokens, action_dim)

    def _action_tokens(self) -> ActionTokens:
        config = self.folder.checkpoint.config
        vocabulary = self.folder.llama['vocab_size'] - config.get('pad_to_multiple_of', 64)
        return ActionTokens(vocabulary, config.get('n_action_bins', 256)).to(self.device)

    def _action_decoder(self) -> ActionDecoder:
        with torch.device('meta'):
            decoder = ActionDecoder(self.folder.width, self.robot.horizon)
        self._fill(decoder, self.folder.action_decoder, dtype=torch.float32)
        return decoder

    def _diffusion_head(self) -> DiffusionHead:
        with torch.device('meta'):
            projector = NoisyActionProjector(self.folder.width)
        self._fill(projector, self.folder.noisy_action_projector)
        return DiffusionHead(
            self._network(),
            projector,
            steps=self.config.model.diffusion_steps,
            horizon=self.robot.horizon,
            action_dim=len(self.robot.action_names),
            seed=self.config.model.seed,
        ).to(self.device)

    def _network(self) -> L1RegressionHead:
        weights = self.folder.head_network
        blocks = {key.split('.')[1] for key in weights if key.startswith('mlp_resnet_blocks.')}
        with torch.device('meta'):
            network = L1RegressionHead(
                self.folder.width,
                self.folder.action_dim,
                hidden_width=self.folder.head_width,
                blocks=len(blocks),
            )
        self._fill(network, weights)
        return network

    def _proprio_projector(self) -> ProprioProjector | None:
        weights = self.folder.proprio_projector
        if weights is None:
            return None
        with torch.device('meta'):
            projector = ProprioProjector(self.folder.proprio_dim, self.folder.width)
        self._fill(projector, weights)
        return projector


def check(config: PolicyConfig) -> None:
    """Find what `load` would refuse, from headers and small files: all but the values of weights.

    Args:
        config: `model.checkpoint` is the folder, `model.name` one of VARIANTS.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: as `load`.
    """
    folder = Folder.open(config.model.checkpoint)
    checker = _Checker(folder, config, torch.device('meta'))
    checker.check_fit()
    checker.check_weights()
    LlamaTokenizer(folder.path, max_tokens=checker.prompt_room)


class _Checker(_Builder):
    """Builds all modules on the meta device and compares them with the headers."""

    def check_weights(self) -> None:
        """Raise CheckpointError where keys or shapes differ."""
        skeleton = self._skeleton()
        self._action_head(skeleton.language_model)
        self._proprio_projector()

    def _fill(
        self,
        module: nn.Module,
        weights: Weights,
        unused: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        check_weights(module, weights, unused)
