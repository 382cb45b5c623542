"""The training loop: steps, averaged weights, checkpoints, curves."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specprune_ros.errors import CheckpointError, ConfigError
from specprune_ros.models import pick_device
from specprune_ros.models.tokenizer import LlamaTokenizer
from specprune_ros.sim.tasks import WITHHELD
from specprune_ros.train.config import FitConfig, TrainConfig
from specprune_ros.train.data import TrainingSet, draw_batch, draw_visual_idx
from specprune_ros.train.gate import Gate, measure
from specprune_ros.train.losses import losses_of, named_patches, patch_labels, patch_loss
from specprune_ros.train.network import AuxiliaryHeads, Network
from specprune_ros.train.precision import reduced
from specprune_ros.train.vocabulary import write_tokenizer

CHECKPOINT, CURVES = 'training.pt', 'curves.csv'
COLUMNS = (
    'step', 'seconds', 'rate', 'action', 'target', 'flag', 'patch', 'words',
    'nearest', 'error_mm', 'action_error', 'heading_deg',
)  # fmt: skip
FIXED = ('tasks', 'proprio', 'horizon', 'withheld')  # of a run's data; more may be collected
# What may change along a run: when it ends, what it runs on, what is written on the way.
FREE = ('steps', 'device', 'threads', 'gate_every', 'gate_scenes', 'keep', 'save_every_s')
SMOOTHING = 0.98  # of the losses in the curves


class Trainer:
    """One run: everything that a checkpoint must hold to go on as if nothing had happened.

    Args:
        config: of the run.
        data: to learn from.
        folder: of checkpoint, curves and tokenizer; a checkpoint in it is gone on with.

    Attributes:
        network, heads: being trained.
        averaged: their exponential averages, what is measured and exported.
        step: done so far.
        seconds: of training so far, all runs together.

    Raises:
        ConfigError: the folder's run has another network, other tasks, or is fitted otherwise; or
            there is no such device or optimiser.
        CheckpointError: its checkpoint cannot be read.
    """

    def __init__(self, config: TrainConfig, data: TrainingSet, folder: Path):
        self.config, self.data, self.folder = config, data, folder
        fit = config.fit
        torch.manual_seed(fit.seed)
        torch.set_num_threads(fit.threads)
        self.network = Network(
            config.network, proprio_dim=len(config.data.proprio), horizon=config.data.horizon
        )
        self.heads = AuxiliaryHeads(config.network.width, len(data.objects))
        self.device = pick_device(fit.device)
        for module in (self.network, self.heads):
            module.to(self.device)
        self.averaged = tuple(copy.deepcopy(m) for m in (self.network, self.heads))
        self.optimizers = make_optimizers(self.network, self.heads, fit)
        self.step, self.seconds = 0, 0.0
        self.smooth: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder, data.instructions, config.network.vocabulary)
        tokenizer = LlamaTokenizer(folder)
        hidden = config.data.withheld == 'instruction'
        sentences = [WITHHELD if hidden else text for text in data.instructions]
        self.prompts = [(*tokenizer.prompt(text).ids, tokenizer.stop_id) for text in sentences]
        if (folder / CHECKPOINT).exists():
            self._load()

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.network.parameters(), *self.heads.parameters()]

    def run(self, report: Callable[[Trainer, Gate], None] = lambda trainer, gate: None) -> bool:
        """Train to the last step, or until SIGTERM or Ctrl-C; both leave a checkpoint.

        Args:
            report: told after every measurement.

        Returns:
            whether all steps are done.
        """
        stop = _StopSignal()
        saved = time.monotonic()
        with stop:
            while self.step < self.config.fit.steps and not stop.asked:
                self.train_step()
                if self.step % self.config.fit.gate_every == 0:
                    report(self, self.measure())
                if time.monotonic() - saved > self.config.fit.save_every_s:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.step >= self.config.fit.steps

    def train_step(self) -> dict[str, float]:
        """One step of the optimiser.

        Returns:
            the losses before it, by name.
        """
        started, fit = time.monotonic(), self.config.fit
        vision = self.step < fit.vision_steps
        values = self._vision_losses() if vision else self._losses()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        values['total'].backward()
        torch.nn.utils.clip_grad_norm_(self._parameters(), fit.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(self.step, fit)
            optimizer.step()
        self._average()
        self.step += 1
        self.seconds += time.monotonic() - started
        floats = {name: float(value.detach()) for name, value in values.items()}
        for name, value in floats.items():
            before = self.smooth.get(name, value)
            self.smooth[name] = SMOOTHING * before + (1 - SMOOTHING) * value
        return floats

    def _vision_losses(self) -> dict[str, Tensor]:
        """Towers and projector alone: a third of the cost, and a question to every patch."""
        fit, size = self.config.fit, self.config.network.image_size
        scenes = fit.layout_images + fit.demo_frames
        batch = draw_batch(
            self.data, self.step, seed=fit.seed, layouts=scenes, instructions=1, demos=0,
            shift_px=fit.shift_px, colour=fit.colour,
        )  # fmt: skip
        batch = batch.to(self.device)
        with reduced(self.device, fit.precision):
            patches = self.network.patches(batch.images)
        loss = patch_loss(patches.float(), self.heads, *patch_labels(batch.pixels, size))
        return {'patch': loss, 'total': loss}

    def _losses(self) -> dict[str, Tensor]:
        fit = self.config.fit
        batch = draw_batch(
            self.data, self.step, seed=fit.seed, layouts=fit.layout_images,
            instructions=fit.layout_instructions, demos=fit.demo_frames,
            shift_px=fit.shift_px, colour=fit.colour,
        )  # fmt: skip
        ids = [self.prompts[index] for index in batch.instruction.tolist()]
        batch = batch.to(self.device)
        labels, visual_idx = patch_labels(batch.pixels, self.config.network.image_size), None
        if fit.token_dropout:
            named = named_patches(labels[0][batch.scene], batch)
            visual_idx = draw_visual_idx(
                self.step, seed=fit.seed, sequences=len(ids), dropout=fit.token_dropout,
                patches=named.shape[1], spared=named.cpu().numpy() if fit.token_spared else None,
                chance=fit.token_spared,
            ).to(self.device)  # fmt: skip
        with reduced(self.device, fit.precision):
            outputs = self.network(batch.images, batch.scene, batch.proprio, ids, visual_idx)
        losses = losses_of(outputs.float(), self.heads, batch, labels, visual_idx)
        values = {f.name: getattr(losses, f.name) for f in dataclasses.fields(losses)}
        return {**values, 'total': losses.total(fit)}

    @torch.no_grad()
    def _average(self) -> None:
        """Follow the weights, faster in the beginning."""
        decay = min(self.config.fit.average, (1 + self.step) / (10 + self.step))
        averaged = [p for module in self.averaged for p in module.parameters()]
        torch._foreach_lerp_(averaged, self._parameters(), 1 - decay)

    def gate(self) -> Gate:
        """The averaged weights on held-out scenes."""
        scenes = self.config.fit.gate_scenes
        return measure(*self.averaged, self.data, self.prompts, scenes)

    def measure(self) -> Gate:
        """The same, as a line of the curves."""
        gate = self.gate()
        figures = {
            'step': self.step,
            'seconds': round(self.seconds, 1),
            'rate': learning_rate(self.step, self.config.fit),
            **self.smooth,
            **dataclasses.asdict(gate),
        }
        path = self.folder / CURVES
        with path.open('a', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore', lineterminator='\n')
            if not file.tell():
                writer.writeheader()
            writer.writerow({k: _short(v) for k, v in figures.items()})
        return gate

    def save(self) -> None:
        """Write the checkpoint at once or not at all."""
        state = {
            'config': dataclasses.asdict(self.config),
            'step': self.step,
            'seconds': self.seconds,
            'smooth': self.smooth,
            'network': self.network.state_dict(),
            'heads': self.heads.state_dict(),
            'averaged': [module.state_dict() for module in self.averaged],
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'bounds': {
                kind: [
                    getattr(self.data, f'{kind}_bounds').low.tolist(),
                    getattr(self.data, f'{kind}_bounds').high.tolist(),
                ]
                for kind in ('action', 'proprio')
            },
        }
        partial = self.folder / f'{CHECKPOINT}.partial'
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
            self._check_same(state['config'])
            self.network.load_state_dict(state['network'])
            self.heads.load_state_dict(state['heads'])
            for module, values in zip(self.averaged, state['averaged'], strict=True):
                module.load_state_dict(values)
            # A run of before Muon has one.
            states = state.get('optimizers') or [state['optimizer']]
            for optimizer, values in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(values)
            self.step, self.seconds = state['step'], state['seconds']
            self.smooth = state['smooth']
            self._cut_curves()
            self.data = self._with_bounds(state['bounds'])
        except ConfigError:
            raise
        except Exception as error:  # zip, pickle and torch each raise their own
            raise CheckpointError(f'{path}: cannot be gone on with: {error}') from error

    def _cut_curves(self) -> None:
        """Drop what was measured after the checkpoint: it is measured again."""
        path = self.folder / CURVES
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        steps = [line.partition(',')[0] for line in lines]
        kept = [
            line
            for step, line in zip(steps, lines, strict=True)
            if line.endswith('\n') and (not step.isdigit() or int(step) <= self.step)
        ]
        if kept != lines:
            partial = path.with_suffix('.partial')
            partial.write_text(''.join(kept))
            os.replace(partial, path)

    def _with_bounds(self, bounds: dict) -> TrainingSet:
        """The data normalised as before: more may have been collected since."""
        changes = {}
        for kind, (low, high) in bounds.items():
            name = f'{kind}_bounds'
            now = getattr(self.data, name)
            changes[name] = dataclasses.replace(now, low=np.array(low), high=np.array(high))
        return dataclasses.replace(self.data, **changes)

    def _check_same(self, before: dict) -> None:
        ours = dataclasses.asdict(self.config)
        defaults = dataclasses.asdict(TrainConfig())
        fit = [name for name in ours['fit'] if name not in FREE]
        fixed = (('network', ours['network']), ('data', FIXED), ('fit', fit))
        for axis, names in fixed:
            for name in names:
                has = before[axis].get(name, defaults[axis][name])  # it may be older than a field
                if _plain(has) != _plain(ours[axis][name]):
                    why = f'the run in {self.folder} has {has}; take another folder'
                    raise ConfigError(f'{axis}.{name}', ours[axis][name], why)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _short(value: float) -> object:
    return float(f'{value:.4g}') if isinstance(value, float) else value


def make_optimizers(
    network: Network, heads: AuxiliaryHeads, fit: FitConfig
) -> list[torch.optim.Optimizer]:
    """AdamW; with `fit.optimizer` muon, Muon for the matrices that map activations.

    Only matrices decay.

    Raises:
        ConfigError: this torch has no Muon.
    """
    inner = [m.weight for m in network.modules() if isinstance(m, torch.nn.Linear)]
    chosen = {id(p) for p in inner} if fit.optimizer == 'muon' else set()
    rest = [p for m in (network, heads) for p in m.parameters() if id(p) not in chosen]
    groups = [
        {'params': [p for p in rest if p.dim() > 1], 'weight_decay': fit.weight_decay},
        {'params': [p for p in rest if p.dim() <= 1], 'weight_decay': 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=fit.rate, betas=(0.9, 0.98))]
    if chosen:
        if not hasattr(torch.optim, 'Muon'):
            raise ConfigError('fit.optimizer', fit.optimizer, 'needs torch 2.9 or newer')
        optimizers.append(
            torch.optim.Muon(
                inner,
                lr=fit.rate,
                weight_decay=fit.weight_decay,
                adjust_lr_fn='match_rms_adamw',  # the same rate serves both
            )
        )
    return optimizers


def learning_rate(step: int, fit: FitConfig) -> float:
    """Up along a line, then down along half a cosine; up again where the decoder joins."""
    joined = step - fit.vision_steps if step >= fit.vision_steps else step
    rise = min(1.0, (joined + 1) / fit.warm_up)
    progress = min(1.0, step / fit.steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return fit.rate * rise * (fit.final_rate + (1 - fit.final_rate) * cosine)


class _StopSignal:
    """Remembers SIGTERM and SIGINT while entered, instead of dying of them."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _StopSignal:
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
