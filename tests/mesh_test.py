"""The real train step on meshes of eight fake CPU devices: what each device computes, holds and sends, and the losses.

One process of eight devices compiles everything; the tests read what it wrote.
"""

import dataclasses
import functools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import agreement, pmap
from benchmarks.fusion_cases import Case
from benchmarks.fusion_step import OurRun
from configs import default, paper
from mmei_jax.collectives import bytes_by_kind, read_collectives
from mmei_jax.config import parse
from mmei_jax.models.mmei import Mmei
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.sharding import batch_sharding, mesh_over, place_activations
from mmei_jax.state import check_split, initial_state, placed_variable_shapes, state_shapes, variable_shapes
from mmei_jax.train_step import jit_train_step, make_train_step
from tests import processes

# data x fsdp x tensor.
ONE, DATA, FSDP, ALL_THREE = (1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)
MESHES = (ONE, DATA, FSDP, ALL_THREE)
NUM_UPDATES = 20
# Every size differs from the others and can be split by what splits it.
ROWS, HEADS, HEAD_DIM, HIDDEN, EMBEDDING = 32, 4, 6, 40, 8
TOKENS = {"vision": 3, "text": 5}
CASE = Case(
    "tiny",
    {},
    batch_size=ROWS,
    feature_dim=16,
    changes={
        "data__modalities": ("vision", "text"),
        "data__max_tokens": {"vision": (TOKENS["vision"],), "audio": (1,), "text": (TOKENS["text"],)},
        "model__dim": HEADS * HEAD_DIM,
        "model__num_heads": HEADS,
        "model__num_layers": 1,
        "model__feedforward_dim": HIDDEN,
        "model__head_num_layers": 0,
        "model__embedding_dim": EMBEDDING,
        "optimizer__schedule": "constant",
        "optimizer__learning_rate": 1e-3,
    },
)
# Sizes as they are trained: BERT's words as the frozen encoder gives them.
CONFIGS = {"default": default, "paper": paper}
WORD_DIM = 768
EIGHT_DEVICES = "from tests.mesh_test import work_on_eight_devices; work_on_eight_devices()"


def title(shape):
    return "x".join(map(str, shape))


def parts(config, tasks):
    """Model and optimizer."""
    model = Mmei(config.model, tasks)
    schedule = make_schedule(config.optimizer, num_steps=NUM_UPDATES, steps_per_epoch=1.0)
    return model, make_optimizer(config.optimizer, variable_shapes(model)["params"], schedule)


def mesh_of(shape):
    return mesh_over(jax.devices()[: math.prod(shape)], fsdp=shape[1], tensor=shape[2])


def work_on_eight_devices():
    """Writes the programs, the losses, and what a device would hold of full-sized states."""
    folder, config = Path(sys.argv[1]), CASE.config()
    everything = CASE.tasks(config)
    batches = [dataclasses.replace(batch, audio=None) for batch in CASE.batches(everything)]
    model, optimizer = parts(config, dataclasses.replace(everything, audio=None))
    initial = jax.device_get(initial_state(model, optimizer, mesh_of(ONE), seed=0, statistics={}))
    found = {"losses": {}, "held": {}}
    found["parameter_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(initial.parameters))
    found["split_bytes"] = sum(
        leaf.size * 4
        for leaf in jax.tree.leaves(state_shapes(model, optimizer, mesh_of(FSDP)).parameters)
        if leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    )
    for shape in MESHES:
        mesh = mesh_of(shape)
        shapes = state_shapes(model, optimizer, mesh)
        state = jax.device_put(initial, jax.tree.map(lambda leaf: leaf.sharding, shapes))
        placed = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
        step = jit_train_step(make_train_step(model, optimizer, config, None), shapes)
        compiled = step.lower(state, placed[0]).compile()
        (folder / f"{title(shape)}.txt").write_text(compiled.as_text())
        if shape == DATA:
            forward = place_activations(mesh, lambda variables, batch: model.apply(variables, batch, is_training=False))
            compiled_forward = jax.jit(forward).lower(state.variables, placed[0]).compile()
            (folder / "forward.txt").write_text(compiled_forward.as_text())
        losses = found["losses"][title(shape)] = []
        for index in range(NUM_UPDATES):
            state, report = compiled(state, placed[index % len(placed)])
            losses.append(float(report.loss))
    found["pmap"] = compared_with_pmap()
    for name, module in CONFIGS.items():
        found["held"][name] = {title(shape): held_share(module, shape) for shape in (FSDP, (1, 1, 8), ALL_THREE)}
    (folder / "found.json").write_text(json.dumps(found))


def compared_with_pmap():
    """How the benchmark's peer differs from our update, and what each holds on a device."""
    config = CASE.config(**{**agreement.CHANGES, "optimizer__learning_rate": 1e-3})
    batches = CASE.batches(CASE.tasks(config))
    ours, theirs = OurRun(CASE, config, batches), pmap.PmapRun(CASE, config, batches)
    difference = agreement.differ(ours.evidence(), theirs.evidence(), tolerance=pmap.TOLERANCE)
    return {"difference": difference, "bytes": [pmap.state_bytes_per_device(run.state) for run in (ours, theirs)]}


def held_share(module, shape):
    """The share of parameters and optimizer state that one device holds; nothing is allocated."""
    config = parse(module.get_config().to_dict())
    tasks = dataclasses.replace(Case("full", {}).tasks(config), word_dim=WORD_DIM)
    model, optimizer = parts(config, tasks)
    mesh = mesh_of(shape)
    own_mesh = dataclasses.replace(config.mesh, data=shape[0], fsdp=shape[1], tensor=shape[2])
    check_split(placed_variable_shapes(model, mesh)["params"], own_mesh)
    state = state_shapes(model, optimizer, mesh)
    leaves = jax.tree.leaves((state.parameters, state.optimizer_state))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return own / total


@dataclass(frozen=True)
class Found:
    """What the process of eight devices wrote.

    Attributes:
        losses: by mesh.
        held: by configuration and mesh, the share of the state that a device holds.
        parameter_bytes: of the tiny model.
        split_bytes: of those of its parameters that the fsdp axis splits.
        pmap: of the benchmark's peer, how it differs from our update, and the bytes that ours and it hold on a device.
        programs: the text of the compiled train step by mesh, and of the "forward" pass of pure data parallelism.
    """

    losses: dict[str, list[float]]
    held: dict[str, dict[str, float]]
    parameter_bytes: int
    split_bytes: int
    pmap: dict[str, Any]
    programs: dict[str, str]

    def collectives(self, name):
        return _read(self.programs[name])


_read = functools.cache(read_collectives)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    code, output = processes.run("-c", EIGHT_DEVICES, str(folder), env=processes.environment(num_devices=8))
    assert code == 0, output
    programs = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    return Found(**json.loads((folder / "found.json").read_text()), programs=programs)


@pytest.mark.parametrize("shape", MESHES[1:], ids=title)
def test_losses_do_not_depend_on_the_mesh(found, shape):
    """Dropout and hidden modalities included: the same numbers are drawn on any mesh."""
    losses, expected = found.losses[title(shape)], found.losses[title(ONE)]
    assert len(set(expected)) == NUM_UPDATES
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=0)


def test_one_device_sends_nothing(found):
    assert "num_partitions" not in found.programs[title(ONE)].partition("\n")[0]
    assert found.collectives(title(ONE)) == []


def test_forward_of_pure_data_parallelism_sends_nothing(found):
    assert "num_partitions=8" in found.programs["forward"].partition("\n")[0]
    assert found.collectives("forward") == []


def test_pure_data_parallelism_adds_up_every_gradient_once(found):
    collectives = found.collectives(title(DATA))
    assert {collective.group_size for collective in collectives} == {8}
    sums = bytes_by_kind(collectives)
    assert sums.keys() == {"all-reduce", "all-gather"}
    # In-batch negatives: every record reads the embeddings and labels of all, whose gradients are added up too.
    negatives = 4 * ROWS * (EMBEDDING + 1)
    num_scalars, rest = divmod(sums["all-reduce"] - found.parameter_bytes - negatives, 4)
    assert rest == 0
    # The loss, totals and counts of three tasks, the norm, alpha, the number of records.
    assert 1 <= num_scalars <= 20
    assert sums["all-gather"] <= 4 * ROWS * (EMBEDDING + 8)


def test_fsdp_gathers_parameters_and_adds_up_gradients(found):
    """XLA's CPU compiler makes no reduce-scatter: it adds up whole gradients, of which each device keeps its slice."""
    collectives = found.collectives(title(FSDP))
    assert {collective.group_size for collective in collectives} == {8}
    sums = bytes_by_kind(collectives)
    assert sums.keys() == {"all-gather", "all-reduce"}
    # Every split parameter is gathered once for forward and backward pass together (scales of norms for each); beside
    # it is what pure data parallelism sends too.
    others = 4 * ROWS * (EMBEDDING + 16)
    assert found.split_bytes > 0.9 * found.parameter_bytes
    assert found.split_bytes <= sums["all-gather"] <= found.split_bytes + others
    assert found.parameter_bytes <= sums["all-reduce"] <= found.parameter_bytes + others


@pytest.mark.parametrize("block", ["self_attention", "cross_attention", "feed_forward"])
@pytest.mark.parametrize("modality", ["vision", "text"])
def test_tensor_parallelism_adds_up_what_heads_and_hidden_features_give(found, modality, block):
    """Once for each block of the forward pass: over the two devices that share a row, not over all."""
    name = f"{modality}_{block}/output/dot_general"
    forward = [
        collective
        for collective in found.collectives(title(ALL_THREE))
        if name in collective.op_name and "transpose" not in collective.op_name and collective.kind == "all-reduce"
    ]
    (collective,) = forward
    assert collective.group_size == ALL_THREE[2]
    assert collective.num_bytes >= 4 * ROWS // 4 * TOKENS[modality] * HEADS * HEAD_DIM


ATTENTION_DOT = re.compile(
    r" = f32\[(\d+),(\d+),\d+,\d+\]\S* dot\(.*op_name=\"([^\"]*)/(?:rhqd,rhkd->rhqk|rhqk,rhkd->rhqd)/"
)


@pytest.mark.parametrize("shape", MESHES, ids=title)
def test_attention_is_split_over_rows_and_heads(found, shape):
    """The matrix products of every attention, forward and backward: each device has its rows, and its heads of them."""
    products = ATTENTION_DOT.findall(found.programs[title(shape)])
    num_attentions = len({re.search(r"\w+_(self|cross)_attention", name).group() for _, _, name in products})
    assert num_attentions == 4
    # Two products forward, and two for the gradient of each.
    assert len(products) == 6 * num_attentions
    data, fsdp, tensor = shape
    assert {(int(rows), int(heads)) for rows, heads, _ in products} == {(ROWS // (data * fsdp), HEADS // tensor)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [FSDP, (1, 1, 8), ALL_THREE], ids=title)
def test_device_holds_its_share_of_the_state(found, name, shape):
    num_shards = shape[1] * shape[2]
    assert 1.0 / num_shards <= found.held[name][title(shape)] <= 1.1 / num_shards


def test_pmap_makes_the_same_updates(found):
    """The peer of the benchmark, on all eight devices: losses, gradients and moments."""
    assert found.pmap["difference"] == ""
    ours, theirs = found.pmap["bytes"]
    # On 8 x 1 x 1 both hold everything.
    assert ours == theirs > 3 * found.parameter_bytes
