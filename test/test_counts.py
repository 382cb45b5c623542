"""Counts instead of times: operators, transfers and FLOPs of a query, on a device not there.

Fake tensors have shapes and a device but no numbers: whatever reads one back raises, and every
operator and every copy between devices can be counted. No clock is involved, so nothing here
depends on the machine.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_policy
from graph_world import name_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from specprune_ros.models.blocks import Block
from specprune_ros.models.decoder import QueryDecoder
from specprune_ros.models.forms import prepared
from specprune_ros.models.preprocess import FastPreprocessor, Staged
from specprune_ros.models.staging import OpenVLAStager, Words
from specprune_ros.pruning import METHODS, make_method
from specprune_ros.pruning.base import PruneRun, QueryContext
from specprune_ros.pruning.flops import flops_share, tokens_per_layer
from specprune_ros.pruning.guard import GuardState
from specprune_ros.pruning.specprune import Memory
from specprune_ros.query import Query, QueryInputs
from specprune_ros.types import Mode

# Stands for a GPU: torch without CUDA refuses to slice even a fake tensor that lies on 'cuda'.
GPU = torch.device('lazy')
DENSE, FINE, COARSE = 'dense', 'fine', 'coarse'
# Kernels of one query of the tiny model with two cameras, 3 % above what was counted with torch
# 2.13, where attention counts as its parts. A change that needs more has to say why.
CEILING = {
    ('none', DENSE): 500,
    ('specprune', DENSE): 703,
    ('specprune', FINE): 838,
    ('specprune', COARSE): 838,
    ('random', COARSE): 970,
    ('uniform', COARSE): 1100,
}
VIEWS = {
    'prim.device',
    'view', '_unsafe_view', 't', 'transpose.int', 'permute', 'slice.Tensor', 'select.int',
    'unsqueeze', 'squeeze.dim', 'expand', 'split.Tensor', 'unbind.int', 'alias', 'detach',
    'as_strided', 'unflatten.int', 'flatten.using_ints', 'chunk', 'numpy_T', 'mT', 'reshape',
}  # fmt: skip


class Counts(TorchDispatchMode):
    """Counts operators, and bytes that go from one device to another."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.moved: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operators[name_of(operator)] += 1
        given = {t.device.type for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for out in tree_leaves(result):
            if torch.is_tensor(out) and given - {out.device.type}:
                source = '+'.join(sorted(given))
                self.moved[source, out.device.type] += out.numel() * out.element_size()
        return result

    @property
    def kernels(self) -> int:
        """Operators that are more than another view of the same memory."""
        return sum(n for name, n in self.operators.items() if name not in VIEWS)


class World:
    """The tiny model on a device of fake tensors."""

    def __init__(self, **parameters):
        policy = make_policy(runtime__warm_up_queries=0, pruning__budget='fixed', **parameters)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.config = policy.config
        self.model = copy.deepcopy(policy.model)
        parts = self.model.parts
        decoder = prepared(self.model.decoder, self.config.model)
        for module in (
            parts.vision_backbone, parts.projector, parts.language_model, parts.action_head,
            *decoder.blocks, *filter(None, [parts.proprio_projector]),
        ):  # fmt: skip
            self._move(module)
        with self.fake:
            frequencies = torch.empty_like(decoder.inverse_frequencies, device=GPU)
        self.decoder = replace(decoder, inverse_frequencies=frequencies)
        self.stager = OpenVLAStager(self.model, torch.device('cpu'))  # no stream to be had
        self.layout = policy._stager.words('pick up the soup').layout
        # A layout's positions are found on the host and copied once per instruction.
        for name, idx in (
            ('visual', self.layout.visual_pos_idx()),
            ('protected', self.layout.protected_pos_idx()),
        ):
            self.layout._on_device[name, str(GPU)] = self.on_gpu(len(idx), dtype=idx.dtype)

    def _move(self, module: torch.nn.Module) -> None:
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.device.type == 'cpu':
                        table[name] = self.on_gpu(*tensor.shape, like=tensor)

    def on_gpu(self, *shape: int, like: torch.Tensor | None = None, dtype=None):
        with self.fake:
            made = torch.empty(shape, dtype=dtype or like.dtype, device=GPU)
        return torch.nn.Parameter(made, False) if isinstance(like, torch.nn.Parameter) else made

    def images(self, size: tuple[int, int]) -> Staged:
        """Of all cameras."""
        cameras = self.model.info.cameras
        return tuple(self.on_gpu(*size, 3, dtype=torch.uint8) for _ in cameras)

    def inputs(self, first: bool = False) -> QueryInputs:
        info, shape = self.model.info, (len(self.model.info.cameras), self.layout.patches)
        images = self.images(info.image_size)
        text = len(self.layout.prompt) + 2
        depth = len(self.decoder.layers)
        memory = Memory(
            self.on_gpu(*shape, dtype=torch.float32), self.on_gpu(depth, dtype=torch.float32)
        )
        return QueryInputs(
            images=images,
            reference=None if first else images,
            words=Words(self.on_gpu(text, dtype=torch.int64), self.layout),
            state=None,
            memory=None if first else memory,
        )

    def query(self, method: str, mode: str) -> tuple[Query, QueryInputs]:
        config = replace(self.config.pruning, method=method)
        context = QueryContext(
            layout=self.layout, depth=len(self.decoder.layers), device=GPU, fine=mode == FINE,
            alpha=config.alpha, similarity=None, memory=None, query=1,
        )  # fmt: skip
        query = Query(
            model=self.model, stager=self.stager, decoder=self.decoder,
            method=make_method(config), config=config, context=context, guard=GuardState(),
        )  # fmt: skip
        return query, self.inputs(first=mode == DENSE)

    def count(self, work) -> Counts:
        with self.fake, torch.no_grad(), Counts() as counts:
            work()
        return counts


@pytest.fixture(scope='module')
def world():
    return World()


@pytest.mark.parametrize(('method', 'mode'), CEILING)
def test_a_query_reads_nothing_back_moves_nothing_and_stays_below_its_ceiling(world, method, mode):
    query, inputs = world.query(method, mode)
    outcomes = []
    counts = world.count(lambda: outcomes.append(query.record(inputs)))
    assert counts.moved == {}, 'nothing passes between host and device inside a query'
    assert counts.kernels <= CEILING[method, mode], counts.operators
    done = outcomes[-1].done
    assert done.actions.device == GPU
    assert (done.trace.mode == Mode.DENSE) == (mode == DENSE)


def test_preprocessing_within_a_query_moves_nothing_and_needs_few_kernels(world):
    query, inputs = world.query('specprune', COARSE)
    stager = copy.copy(world.stager)
    stager.pixels = FastPreprocessor(center_crop=True, device=GPU).fit
    raw = world.images((480, 640))
    query = replace(query, stager=stager)
    inputs = replace(inputs, images=raw, reference=raw)
    world.count(lambda: stager.pixels(raw))  # sends the weights, once per size
    counts = world.count(lambda: query.record(inputs))
    assert counts.moved == {}
    fitting = 2 * world.count(lambda: stager.pixels(raw)).kernels
    assert fitting <= 2 * 7, 'of the query and its reference'
    assert counts.kernels <= CEILING['specprune', COARSE] + fitting


def test_every_method_has_a_ceiling():
    assert {method for method, _ in CEILING} == set(METHODS)


def test_pruning_adds_as_many_kernels_per_layer_as_the_paper_s_steps_need(world):
    """Scores, ranks and their running mean at a layer that only updates: no more than this."""
    counts = {}
    for layers in ((5,), (5, 6, 7)):
        query, inputs = world.query('specprune', COARSE)
        config = replace(query.config, update_layers=layers, prune_layers=(32,))
        query = replace(query, config=config, method=make_method(config))
        counts[len(layers)] = world.count(lambda q=query, i=inputs: q.record(i)).kernels
    assert (counts[3] - counts[1]) / 2 <= 20


def test_words_are_sent_once_per_instruction_and_the_state_alone_each_time(world):
    stager = OpenVLAStager(World(robot__joint_names=('a', 'b', 'c')).model, GPU)
    with world.fake, Counts() as counts:
        words = stager.words('open the drawer')
        assert stager.words('open the drawer') is words
        stager.state(np.zeros(3))
        stager.state(np.ones(3))
    length = len(words.ids)
    assert counts.moved == {('cpu', GPU.type): 8 * length + 2 * 3 * 4}


def run_decoder(world, run: PruneRun, decoder=None, passes: int = 1) -> None:
    embeds = world.on_gpu(world.layout.length, world.decoder.width, dtype=torch.float32)
    decode = QueryDecoder(decoder or world.decoder, world.layout, run, check=False)
    for _ in range(passes):
        decode(embeds)


def flops(world, method: str, decoder=None) -> tuple[int, list[int], list[int]]:
    """Of one pass in coarse mode, and the layers after which tokens go, and what is left."""
    query, inputs = world.query(method, COARSE)
    shape = inputs.memory.global_rank.shape
    similarity = world.on_gpu(*shape, dtype=torch.float32)
    context = replace(query.context, similarity=similarity, memory=inputs.memory)
    with world.fake, torch.no_grad(), FlopCounterMode(display=False) as counter:
        run = query.method.begin(context)
        run_decoder(world, run, decoder)
        trace = run.trace()
    return counter.get_total_flops(), trace.layer_index, trace.layer_tokens


def matrix_flops(tokens: int, width: int, mlp_width: int) -> int:
    """Of one decoder layer, a product and a sum counted apart, and gate, up and down all three."""
    products = 4 * tokens * width**2 + 3 * tokens * width * mlp_width
    return 2 * (products + 2 * tokens**2 * width)


@pytest.mark.parametrize('fused', [True, False])
def test_a_dense_pass_costs_what_its_layers_matrix_products_cost(world, fused):
    decoder = world.decoder
    if not fused:
        blocks = [Block(layer, decoder.head_dim) for layer in decoder.layers]
        decoder = replace(decoder, blocks=blocks)
    total, layers, _ = flops(world, 'none', decoder)
    expected = matrix_flops(world.layout.length, decoder.width, decoder.mlp_width)
    assert total == len(decoder.layers) * expected
    assert layers == []


def test_a_pruned_pass_costs_its_share_and_little_for_the_scores(world):
    """The share that reports hold is A.3's, whose model of an MLP has two products, not three."""
    width, mlp_width, depth = world.decoder.width, world.decoder.mlp_width, 12
    total, layers, left = flops(world, 'specprune')
    before = [world.layout.visual_count, *left]
    gone = {layer: had - has for layer, had, has in zip(layers, before, left, strict=False)}
    counts = tokens_per_layer(world.layout.length, depth, gone)
    layers_alone = sum(matrix_flops(count, width, mlp_width) for count in counts)
    dense = depth * matrix_flops(world.layout.length, width, mlp_width)
    assert 0 <= total - layers_alone <= 0.01 * dense, 'scores'
    assert total / dense == pytest.approx(
        flops_share(counts, width=width, mlp_width=mlp_width), abs=0.05
    )


def test_later_passes_of_a_diffusion_head_decide_nothing_anew(world):
    """Tokens, where they stand and their rotary embedding are the first pass's."""

    def kernels(passes: int) -> int:
        query, inputs = world.query('specprune', COARSE)
        context = replace(query.context, memory=inputs.memory)

        def work():
            run_decoder(world, query.method.begin(context), passes=passes)

        return world.count(work).kernels

    one, two, three = kernels(1), kernels(2), kernels(3)
    dense = world.count(lambda: run_decoder(world, PruneRun(None))).kernels
    assert three - two == two - one
    assert two - one <= dense < one
