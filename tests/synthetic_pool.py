"""A stand-in for a trained model in tests of the feedback loop: noisy embeddings of the simulator's own causes."""

import copy

import jax
import numpy as np

from configs import feedback
from mmei_jax.feedback import loop_config
from mmei_jax.feedback.environment import World, make_world, new_users
from mmei_jax.feedback.impressions import visits_to_log
from mmei_jax.feedback.logged_visits import LoggedVisits
from mmei_jax.feedback.slate_policies import Pool
from mmei_jax.feedback.visits import visit
from mmei_jax.simulation.aigc_int import EMOTIONS, INTENTS, KINDS
from mmei_jax.simulation.aigc_int_feedback import item_ids, item_world

RECORDS_PER_STATE = 10


def make_pool(*, num_per_kind: int = 40, noise: float = 0.3, seed: int = 0) -> tuple[Pool, World]:
    """Ten records of each emotion and intent, and a world with the first few items of each kind.

    F_u . E_c is the simulator's score for a user of average taste, but for quality and noise: what a good model knows.
    """
    items, generator = item_world(), np.random.default_rng(seed)
    emotion = np.repeat(np.arange(len(EMOTIONS)), len(INTENTS) * RECORDS_PER_STATE)
    intent = np.tile(np.repeat(np.arange(len(INTENTS)), RECORDS_PER_STATE), len(EMOTIONS))
    causes = np.concatenate([items.emotion_fit, items.intent_fit], axis=1)
    shown = np.concatenate([np.eye(len(EMOTIONS))[emotion], np.eye(len(INTENTS))[intent]], axis=1)
    shown = shown + noise * generator.normal(size=shown.shape)
    kept = np.sort(np.concatenate([np.flatnonzero(items.kind == kind)[:num_per_kind] for kind in range(len(KINDS))]))
    world = make_world(emotion, intent)
    world = world.replace(
        state_score=world.state_score[:, kept], style=world.style[kept], item_kind=world.item_kind[kept]
    )
    ids = tuple(item_ids()[row] for row in kept)
    return Pool(shown.astype(np.float32), causes[kept].astype(np.float32), items.kind[kept], ids), world


def make_config(**changes) -> loop_config.LoopConfig:
    """A loop of seconds; ``group__key=value`` changes a key, ``key=value`` one without a group."""
    values = copy.deepcopy(feedback.get_config().to_dict())
    small = {
        "visits__num_users": 200,
        "visits__num_rounds": 2,
        "visits__visits_per_round": 3,
        "visits__slate_size": 3,
        "visits__truth_visits": 3,
        # The scores of this model are the simulator's.
        "learning__temperature": 1.0,
        "learning__learning_rate": 0.01,
        "learning__num_steps": 30,
        "learning__batch_size": 64,
        "reward_model__num_folds": 3,
        "gate__num_draws": 200,
        "ab__num_visits": 3,
        "ab__num_seeds": 2,
        "ab__num_draws": 200,
    }
    for dotted, value in {**small, **changes}.items():
        group, _, key = dotted.partition("__")
        if key:
            values[group][key] = value
        else:
            values[group] = value
    return loop_config.parse(values)


def write_visits(key, world, policy, config, *, num_users=None) -> LoggedVisits:
    """What a log would hold of one round of new users, without its files."""
    num_users = num_users or config.visits.num_users
    users_key, visits_key = jax.random.split(key)
    users = new_users(users_key, world, num_users, config.environment)
    _, found = visit(
        visits_key,
        world,
        users,
        policy,
        num_visits=config.visits.visits_per_round,
        slate_size=config.visits.slate_size,
        config=config.environment,
    )
    return visits_to_log(jax.device_get(found))
