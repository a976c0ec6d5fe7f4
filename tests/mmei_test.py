"""The assembled model: what its outputs and gradients depend on, and what they must not."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax import config as config_module
from mmei_jax.models import heads
from mmei_jax.models.mmei import Mmei, ModalityInput, Tasks
from mmei_jax.types import MODALITIES, Batch, Items, RankingTargets, Slate, TokenSequence

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "default.py"
INPUT_DIMS = {"vision": 5, "audio": 4, "text": 6}
MAX_TOKENS = 8
ITEM_DIM, NUM_KINDS = 3, 2
TASKS = Tasks(
    **{name: ModalityInput(dim, MAX_TOKENS) for name, dim in INPUT_DIMS.items()},
    emotion="softmax",
    num_emotions=7,
    num_intents=4,
    has_ranking=True,
    item_dim=ITEM_DIM,
    num_kinds=NUM_KINDS,
    learns_task_weights=True,
)
# Compiling is what takes time here.
COMPILE_QUICKLY = {"xla_backend_optimization_level": 0}
PAPER = {
    "projection_bias": False,
    "modality_embedding": False,
    "position_embedding": False,
    "head_num_layers": 0,
    "normalize_embeddings": False,
}


@functools.cache
def default_config():
    spec = importlib.util.spec_from_file_location("default_config", DEFAULT_CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config_module.parse(module.get_config().to_dict()).model


def make_model(tasks=TASKS, **changes):
    small = {
        "dim": 8,
        "num_heads": 2,
        "num_layers": 1,
        "feedforward_dim": 12,
        "embedding_dim": 5,
        "dropout_rate": 0.0,
        "modality_dropout_rate": 0.0,
    }
    return Mmei(dataclasses.replace(default_config(), **{**small, **changes}), tasks)


def make_records(num_records=6, seed=0):
    """Per record and modality, ``[tokens, dim]`` features; some records lack some modalities, one lacks all."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 4, (num_records, 3))
    lengths[1] = 0
    lengths[2, 0] = lengths[3, 1] = lengths[4, 2] = 0
    return [
        {
            name: rng.normal(size=(length, INPUT_DIMS[name])).astype(np.float32)
            for name, length in zip(MODALITIES, row, strict=True)
        }
        for row in lengths
    ]


def make_batch(records, num_segments=1, num_tokens=None, padding=0.0):
    """Packs consecutive records into rows, each modality padded to ``num_tokens``, and adds ranking targets."""
    num_rows = len(records) // num_segments
    sequences = {}
    for name in MODALITIES:
        features = np.full((num_rows, num_tokens or 3 * num_segments, INPUT_DIMS[name]), padding, np.float32)
        segment_ids = np.zeros(features.shape[:2], np.int32)
        for row in range(num_rows):
            start = 0
            for segment in range(num_segments):
                tokens = records[row * num_segments + segment][name]
                features[row, start : start + len(tokens)] = tokens
                segment_ids[row, start : start + len(tokens)] = segment + 1
                start += len(tokens)
        sequences[name] = TokenSequence(jnp.asarray(features), jnp.asarray(segment_ids))
    num_records = len(records)
    items = np.random.default_rng(3).normal(size=(num_records, ITEM_DIM)).astype(np.float32)
    ranking = RankingTargets(
        positive=Items(jnp.asarray(items), jnp.arange(num_records) % NUM_KINDS),
        positive_index=jnp.arange(num_records),
        has_positive=jnp.ones(num_records, bool),
        log_sampling_probability=jnp.zeros(num_records),
        relevant_index=jnp.zeros((num_records, 2), jnp.int32),
    )
    is_record = jnp.ones(num_records, bool)
    return Batch(**sequences, is_record=is_record, record_index=jnp.arange(num_records), ranking=ranking)


def without(batch, *names):
    """The batch, with every token of these modalities turned into padding."""
    hidden = {}
    for name in names:
        sequence = getattr(batch, name)
        hidden[name] = TokenSequence(sequence.features, jnp.zeros_like(sequence.segment_ids))
    return dataclasses.replace(batch, **hidden)


@functools.cache
def make_variables(model, seed=1):
    """Random parameters and statistics, away from zeros and ones, so that a forgotten one is seen."""
    shapes = jax.eval_shape(functools.partial(model.init, is_training=False), jax.random.key(0), full_batch(model))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(offset + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes))


def full_batch(model):
    batch = make_batch(make_records())
    return dataclasses.replace(batch, **{name: None for name in MODALITIES if name not in model.tasks.inputs()})


@functools.cache
def compiled(model):
    return jax.jit(functools.partial(model.apply, is_training=False), compiler_options=COMPILE_QUICKLY)


def apply(model, batch, variables=None):
    return compiled(model)(variables or make_variables(model), batch)


def weighted_total(outputs, num_records):
    """One number that depends on every float of every record's outputs, each with a weight of its own."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if leaf.shape[:1] == (num_records,)]
    rng = np.random.default_rng(4)
    return sum(jnp.vdot(leaf, jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)) for leaf in leaves)


@functools.cache
def compiled_gradient(model, is_training=False):
    def loss(params, features, statistics, batch, rngs):
        filled = {name: TokenSequence(features[name], getattr(batch, name).segment_ids) for name in features}
        batch = dataclasses.replace(batch, **filled)
        variables = {"params": params, "statistics": statistics}
        outputs = model.apply(variables, batch, is_training=is_training, rngs=rngs)
        return weighted_total(outputs, batch.is_record.shape[0])

    return jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=COMPILE_QUICKLY)


def differentiate(model, batch, is_training=False):
    """Gradients of :func:`weighted_total` with respect to the parameters, flat by path, and to the features."""
    variables = make_variables(model)
    features = {name: sequence.features for name, sequence in batch.sequences().items()}
    rngs = {name: jax.random.key(5) for name in ("dropout", "modality_dropout")} if is_training else {}
    params, features = compiled_gradient(model, is_training)(
        variables["params"], features, variables["statistics"], batch, rngs
    )
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in paths}, features


def assert_same(actual, expected, atol=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


def largest_change(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.abs(first - second).max()) for first, second in pairs)


def without_task_weights(outputs):
    return dataclasses.replace(outputs, task_log_variances=None)


CHOICES = [("mean", "additive"), ("attention", "concatenation"), ("first", "scalars")]


@pytest.mark.parametrize(("pooling", "modality_weighting"), CHOICES)
def test_outputs_do_not_depend_on_batch_mates_padding_or_what_padding_holds(pooling, modality_weighting):
    model = make_model(pooling=pooling, modality_weighting=modality_weighting)
    records = make_records()
    together = without_task_weights(apply(model, make_batch(records)))
    more_padding = without_task_weights(apply(model, make_batch(records, num_tokens=MAX_TOKENS, padding=np.nan)))
    assert_same(more_padding, together)
    assert_same(without_task_weights(apply(model, make_batch(records, padding=np.inf))), together, atol=0)
    nothing = {name: record[:0] for name, record in records[0].items()}
    for index in range(len(records)):
        mates_gone = [record if place == index else nothing for place, record in enumerate(records)]
        alone = without_task_weights(apply(model, make_batch(mates_gone)))
        assert_same(*(jax.tree.map(lambda leaf, i=index: leaf[i], each) for each in (alone, together)))


def test_outputs_do_not_depend_on_the_size_of_the_batch():
    model, records = make_model(), make_records()
    together = without_task_weights(apply(model, make_batch(records)))
    alone = without_task_weights(apply(model, make_batch(records[:1])))
    assert_same(alone, jax.tree.map(lambda leaf: leaf[:1], together))


@pytest.mark.parametrize("num_segments", [2, 3])
def test_packed_rows_equal_separate_rows(num_segments):
    model, records = make_model(), make_records()
    separate, packed = make_batch(records), make_batch(records, num_segments)
    assert_same(apply(model, packed), apply(model, separate))
    expected, _ = differentiate(model, separate)
    actual, _ = differentiate(model, packed)
    for path, gradient in expected.items():
        # Softmax does not see what the bias of the keys adds: its true gradient is zero.
        scale = 1.0 if path.endswith("key/bias") else np.linalg.norm(gradient)
        assert np.linalg.norm(actual[path] - gradient) <= 1e-5 * scale, path


@pytest.mark.parametrize("absent", MODALITIES)
@pytest.mark.parametrize(
    ("pooling", "modality_weighting", "is_training"), [*((*choice, False) for choice in CHOICES), (*CHOICES[0], True)]
)
def test_absent_modality_gets_exactly_zero(absent, pooling, modality_weighting, is_training):
    rates = {"dropout_rate": 0.2, "modality_dropout_rate": 0.3} if is_training else {}
    model = make_model(pooling=pooling, modality_weighting=modality_weighting, **rates)
    batch = without(make_batch(make_records(), padding=np.nan), absent)
    index = MODALITIES.index(absent)
    if not is_training:
        outputs = apply(model, batch)
        np.testing.assert_array_equal(outputs.modality_weights[:, index], 0.0)
        np.testing.assert_array_equal(outputs.modality_vectors[:, index], 0.0)
    gradients, features = differentiate(model, batch, is_training)
    np.testing.assert_array_equal(features[absent], 0.0)
    own = {path: gradient for path, gradient in gradients.items() if absent in path}
    assert len(own) > 20
    for path, gradient in own.items():
        np.testing.assert_array_equal(gradient, 0.0, err_msg=path)
    for head in ("emotion_head", "intent_head"):
        np.testing.assert_array_equal(gradients[f"{head}/token_embedding"][1 + index], 0.0)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    other = MODALITIES[(index + 1) % 3]
    assert np.any(gradients[f"embed_{other}/projection/kernel"])


def test_padding_gets_exactly_zero_gradient():
    batch = make_batch(make_records(), padding=np.nan)
    gradients, features = differentiate(make_model(), batch)
    for name, sequence in batch.sequences().items():
        is_token = np.asarray(sequence.segment_ids) > 0
        np.testing.assert_array_equal(np.asarray(features[name])[~is_token], 0.0)
        assert np.abs(np.asarray(features[name])[is_token]).max(axis=-1).min() > 0
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_every_subset_of_modalities_is_answered():
    rng = np.random.default_rng(0)
    subsets = [[(subset % 8 >> index) & 1 for index in range(3)] for subset in range(12)]
    records = [
        {
            name: rng.normal(size=(2 * has, INPUT_DIMS[name])).astype(np.float32)
            for name, has in zip(MODALITIES, subset, strict=True)
        }
        for subset in subsets
    ]
    model = make_model()
    for start in (0, 6):
        batch, is_present = make_batch(records[start : start + 6]), np.array(subsets[start : start + 6], bool)
        outputs = apply(model, batch)
        np.testing.assert_array_equal(np.asarray(outputs.modality_weights) > 0, is_present)
        np.testing.assert_allclose(outputs.modality_weights.sum(axis=-1), is_present.any(axis=-1), atol=1e-6)
        np.testing.assert_array_equal(outputs.fused[~is_present.any(axis=-1)], 0.0)
        results = (outputs, *differentiate(model, batch))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_modality_that_the_batch_lacks_is_absent():
    model, batch = make_model(), make_batch(make_records())
    expected = apply(model, without(batch, "audio"))
    assert_same(apply(model, dataclasses.replace(batch, audio=None)), expected, atol=1e-6)
    nothing = apply(model, dataclasses.replace(batch, vision=None, audio=None, text=None))
    np.testing.assert_array_equal(nothing.modality_weights, 0.0)


def test_model_of_one_modality_gives_it_all_the_weight():
    model = make_model(dataclasses.replace(TASKS, vision=None, text=None))
    outputs = apply(model, full_batch(model))
    is_present = np.array([bool(len(record["audio"])) for record in make_records()])
    np.testing.assert_allclose(outputs.modality_weights, is_present[:, None] * np.array([[0, 1, 0]]), atol=1e-6)
    assert outputs.modality_vectors.shape == (6, 3, 8)
    assert not np.any(outputs.modality_vectors[:, 0::2])


def change_params(variables, pattern, change):
    """The variables with ``change`` applied to each parameter whose path contains the pattern."""
    changed = []

    def visit(path, leaf):
        name = "/".join(key.key for key in path)
        if pattern not in name:
            return leaf
        changed.append(name)
        return change(leaf)

    result = {**variables, "params": jax.tree_util.tree_map_with_path(visit, variables["params"])}
    assert changed
    return result


@pytest.mark.parametrize("pattern", ["cross_attention/output/kernel", "weighting/", "statistics", "token_embedding"])
def test_outputs_depend_on(pattern):
    model, batch = make_model(), make_batch(make_records())
    variables = make_variables(model)
    if pattern == "statistics":
        changed = {**variables, "statistics": jax.tree.map(jnp.zeros_like, variables["statistics"])}
    else:
        changed = change_params(variables, pattern, jnp.zeros_like)
    before, after = apply(model, batch), apply(model, batch, changed)
    assert largest_change(before.emotion, after.emotion) > 1e-3
    assert largest_change(before.intent, after.intent) > 1e-3


@pytest.mark.parametrize("moved", MODALITIES)
def test_each_modality_reaches_the_vectors_of_the_others(moved):
    model, batch = make_model(), make_batch(make_records())
    sequence = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), getattr(batch, moved))
    before, after = apply(model, batch), apply(model, dataclasses.replace(batch, **{moved: sequence}))
    for index, name in enumerate(MODALITIES):
        if name != moved:
            changes = jnp.abs(before.modality_vectors[:, index] - after.modality_vectors[:, index]).max(axis=-1)
            assert changes[0] > 1e-3
            # Record 1 has nothing; where it goes, this modality is missing, and it has no other to be changed.
            assert changes[1] == 0.0
    assert largest_change(before.emotion, after.emotion) > 1e-3


def test_fixed_alpha_changes_what_is_said_but_not_the_vectors():
    model, batch = make_model(), make_batch(make_records())
    fixed = change_params(make_variables(model), "scorer_output", jnp.zeros_like)
    before, after = apply(model, batch), apply(model, batch, fixed)
    np.testing.assert_allclose(after.modality_weights[0], 1 / 3, atol=1e-6)
    np.testing.assert_array_equal(before.modality_vectors, after.modality_vectors)
    for name in ("fused", "emotion", "intent", "user_embedding"):
        assert largest_change(getattr(before, name), getattr(after, name)) > 1e-3


def test_fused_is_the_weighted_sum_of_the_vectors():
    outputs = apply(make_model(), make_batch(make_records()))
    expected = np.einsum("bm,bmd->bd", outputs.modality_weights, outputs.modality_vectors)
    np.testing.assert_allclose(outputs.fused, expected, atol=1e-6)


def test_paper_preset_is_equations_1_to_5_to_the_letter():
    model, batch = make_model(**PAPER), make_batch(make_records())
    variables, outputs = make_variables(model), apply(make_model(**PAPER), batch)
    params = jax.tree.map(np.asarray, variables["params"])
    assert all(list(params[f"embed_{name}"]) == ["projection"] for name in MODALITIES)
    assert all(list(params[f"embed_{name}"]["projection"]) == ["kernel"] for name in MODALITIES)
    fused = np.asarray(outputs.fused)
    for name in ("emotion", "intent"):
        assert list(params[f"{name}_head"]) == ["logits"]
        logits = params[f"{name}_head"]["logits"]
        np.testing.assert_allclose(getattr(outputs, name), fused @ logits["kernel"] + logits["bias"], atol=1e-5)
        np.testing.assert_array_equal(getattr(outputs, f"{name}_state"), fused)
    user = params["user_projection"]
    joined = np.concatenate([fused] * 3, axis=-1)
    np.testing.assert_allclose(outputs.user_embedding, joined @ user["kernel"] + user["bias"], atol=1e-5)


def test_embeddings_have_unit_length_when_normalised():
    outputs = apply(make_model(), make_batch(make_records()))
    for embedding in (outputs.user_embedding, outputs.positive_embedding):
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1.0, atol=1e-6)
    raw = apply(make_model(**PAPER), make_batch(make_records()))
    assert np.abs(np.linalg.norm(raw.user_embedding, axis=-1) - 1.0).max() > 0.1


def test_embedding_of_length_zero_stays_zero_with_finite_gradient():
    embedding = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    finished, pull_back = jax.vjp(lambda x: heads.finish_embedding(x, True), embedding)
    np.testing.assert_allclose(finished, [[0.0, 0.0], [0.6, 0.8]], atol=1e-6)
    (gradient,) = pull_back(jnp.ones((2, 2)))
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [0.2 * 0.16, -0.2 * 0.12]], atol=1e-6)


def test_items_are_embedded_alike_wherever_they_stand():
    model, batch = make_model(), make_batch(make_records())
    positive = batch.ranking.positive
    stacked = Items(jnp.stack([positive.features] * 2, axis=1), jnp.stack([positive.kind] * 2, axis=1))
    nothing = jnp.zeros((6, 2))
    slate = Slate(stacked, nothing.astype(jnp.int32), nothing, nothing.astype(bool))
    with_slate = dataclasses.replace(batch, ranking=dataclasses.replace(batch.ranking, slate=slate))
    outputs = apply(model, with_slate)
    catalogue = model.apply(make_variables(model), positive, method=Mmei.embed_items)
    np.testing.assert_allclose(outputs.positive_embedding, catalogue, atol=1e-6)
    np.testing.assert_allclose(outputs.slate_embedding[:, 1], catalogue, atol=1e-6)
    other_kind = Items(positive.features, 1 - positive.kind)
    other = model.apply(make_variables(model), other_kind, method=Mmei.embed_items)
    assert jnp.abs(other - catalogue).max(axis=-1).min() > 1e-3


def test_task_head_does_not_read_absent_modalities():
    head = heads.TaskHead(make_model().config, 7)
    rng = np.random.default_rng(0)
    fused, vectors = (
        jnp.asarray(rng.normal(size=(2, 8)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32),
    )
    is_present = jnp.array([[True, False, True], [False, False, False]])
    variables = jax.jit(functools.partial(head.init, is_training=False))(jax.random.key(0), fused, vectors, is_present)
    read_out = jax.jit(functools.partial(head.apply, is_training=False))
    logits, state = read_out(variables, fused, vectors, is_present)
    garbage = jnp.where(is_present[..., None], vectors, 100.0)
    other, _ = read_out(variables, fused, garbage, is_present)
    np.testing.assert_allclose(other, logits, atol=1e-6)
    assert state.shape == (2, 8)
    read, _ = read_out(variables, fused, vectors.at[0, 0, 0].add(1.0), is_present)
    assert jnp.abs(read[0] - logits[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("emotion", "num_emotions", "shape"), [("softmax", 7, (6, 7)), ("sigmoid", 6, (6, 6)), ("regression", 1, (6,))]
)
def test_tasks_decide_the_shapes_of_outputs(emotion, num_emotions, shape):
    tasks = dataclasses.replace(
        TASKS,
        emotion=emotion,
        num_emotions=num_emotions,
        num_intents=None,
        has_ranking=False,
        learns_task_weights=False,
    )
    model = make_model(tasks)
    outputs = jax.eval_shape(compiled(model), make_variables(model), full_batch(model))
    assert outputs.emotion.shape == shape
    assert outputs.emotion_state.shape == (6, 8)
    for name in ("intent", "intent_state", "user_embedding", "positive_embedding", "task_log_variances"):
        assert getattr(outputs, name) is None
    assert tasks.names() == ("emotion",)
    assert TASKS.names() == ("emotion", "intent", "ranking")
    outputs = jax.eval_shape(compiled(make_model()), make_variables(make_model()), full_batch(make_model()))
    assert outputs.task_log_variances.shape == (3,)


@functools.cache
def compiled_training():
    """The model in training, with both rates traced."""

    variables = make_variables(make_model())

    def train(rate, modality_rate, seed, batch):
        config = dataclasses.replace(make_model().config, dropout_rate=rate, modality_dropout_rate=modality_rate)
        rngs = {name: jax.random.key(seed) for name in ("dropout", "modality_dropout")}
        return Mmei(config, TASKS).apply(variables, batch, is_training=True, rngs=rngs)

    return jax.jit(train, compiler_options=COMPILE_QUICKLY)


def test_modality_dropout_keeps_one_modality_of_each_record():
    records = make_records()
    had = np.array([[bool(len(record[name])) for name in MODALITIES] for record in records])
    all_kept = []
    for seed in range(10):
        outputs = compiled_training()(0.0, 0.9, seed, make_batch(records))
        is_kept = np.asarray(outputs.modality_weights) > 0
        assert not np.any(is_kept & ~had)
        np.testing.assert_array_equal(is_kept.any(axis=-1), had.any(axis=-1))
        all_kept.append(is_kept)
    # At a rate of 0.9, records with two or three modalities keep hardly more than one.
    assert np.mean(all_kept) < 0.6 * had.mean()
    assert len(np.unique(all_kept, axis=0)) > 1


def test_dropout_follows_its_key_and_takes_a_traced_rate():
    train = functools.partial(compiled_training(), batch=make_batch(make_records()))
    assert_same(train(0.2, 0.3, 0), train(0.2, 0.3, 0), atol=0)
    assert largest_change(train(0.2, 0.0, 0), train(0.2, 0.0, 1)) > 1e-3
    assert largest_change(train(0.0, 0.5, 0), train(0.0, 0.5, 1)) > 1e-3
    assert_same(train(0.0, 0.0, 0), apply(make_model(), make_batch(make_records())), atol=1e-6)


def test_dropout_is_no_part_of_the_program_where_it_is_off():
    def program(model, is_training):
        arguments = make_variables(make_model()), make_batch(make_records())
        return str(jax.make_jaxpr(functools.partial(model.apply, is_training=is_training))(*arguments))

    assert program(make_model(), is_training=True) == program(make_model(), is_training=False)
    dropping = make_model(dropout_rate=0.2, modality_dropout_rate=0.1)
    assert program(dropping, is_training=False) == program(make_model(), is_training=False)


def test_bfloat16_rounds_matrix_products_only():
    model, batch = make_model(), make_batch(make_records())
    rounded = apply(make_model(compute_dtype="bfloat16"), batch, make_variables(model))
    exact = apply(model, batch)
    for name in ("emotion", "intent", "modality_weights", "modality_vectors", "fused", "user_embedding"):
        one, other = np.asarray(getattr(rounded, name)), np.asarray(getattr(exact, name))
        assert one.dtype == np.float32
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        # About ten products in a row, two operands each, rounded by at most half of 2**-7.
        assert 0 < error < 20 * 2**-8, name
    np.testing.assert_allclose(rounded.modality_weights.sum(axis=-1), exact.modality_weights.sum(axis=-1), atol=1e-6)


def test_every_parameter_names_its_axes():
    names = {"embed", "heads", "mlp", "features", "classes", "position", "kind"}
    for choice in CHOICES:
        model = make_model(pooling=choice[0], modality_weighting=choice[1])
        initialize = functools.partial(model.init, is_training=False)
        params = jax.eval_shape(initialize, jax.random.key(0), full_batch(model))["params"]
        boxes = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
        for box in boxes:
            assert isinstance(box, nn.LogicallyPartitioned)
            assert len(box.names) == box.value.ndim
            assert set(box.names) <= names
            assert box.value.dtype == jnp.float32


def test_default_size_has_the_parameters_that_its_description_implies():
    config = default_config()
    tasks = dataclasses.replace(
        TASKS, vision=ModalityInput(768, 16), audio=ModalityInput(768, 50), text=ModalityInput(768, 32)
    )
    d, hidden = config.dim, config.feedforward_dim
    attention = 3 * (d * d + d) + d * d
    feed_forward = d * hidden + hidden + hidden * d + d
    embedding = sum(768 * d + d + d + tokens * d for tokens in (16, 50, 32))
    layers = config.num_layers * 3 * (2 * attention + feed_forward + 3 * 2 * d) + 3 * 2 * d
    weighting = 3 * (d * d + d + d)
    head = 4 * d + config.head_num_layers * (attention + feed_forward + 2 * 2 * d) + 2 * d
    head_outputs = d * 7 + 7 + d * 4 + 4
    ranking = 3 * d * config.embedding_dim + (1 + ITEM_DIM + 1 + NUM_KINDS) * config.embedding_dim
    expected = embedding + layers + weighting + 2 * head + head_outputs + ranking + len(tasks.names())

    def sequence(tokens):
        return TokenSequence(jnp.zeros((32, tokens, 768)), jnp.ones((32, tokens), jnp.int32))

    batch = Batch(sequence(16), sequence(50), sequence(32), jnp.ones(32, bool), jnp.arange(32))
    model = Mmei(config, tasks)
    variables = jax.eval_shape(functools.partial(model.init, is_training=False), jax.random.key(0), batch)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected


def test_batch_that_does_not_fit_the_model_is_refused():
    model, batch = make_model(), make_batch(make_records())
    variables = make_variables(model)
    text_only = make_model(dataclasses.replace(TASKS, vision=None, audio=None))
    with pytest.raises(ValueError, match=r"batch\.audio: the model reads text only"):
        text_only.apply(make_variables(text_only), batch, is_training=False)
    wide = TokenSequence(jnp.zeros((6, 3, 9)), jnp.ones((6, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"batch.text.features .*expected \(6, tokens, 6\)"):
        model.apply(variables, dataclasses.replace(batch, text=wide), is_training=False)
    long = TokenSequence(jnp.zeros((6, MAX_TOKENS + 1, 6)), jnp.ones((6, MAX_TOKENS + 1), jnp.int32))
    with pytest.raises(ValueError, match=r"batch\.text: 9 tokens, the position table has 8"):
        model.apply(variables, dataclasses.replace(batch, text=long), is_training=False)
    with pytest.raises(ValueError, match="batch of 5 records: expected a multiple of its 6 rows"):
        model.apply(variables, dataclasses.replace(batch, is_record=jnp.ones(5, bool)), is_training=False)
