"""The feedback loop on simulated users: log, learn, evaluate off-policy, gate, deploy, and an A/B at the end.

For ``python -m mmei_jax.feedback.run``. Types, choices and the checks that join two keys:
mmei_jax/feedback/loop_config.py.
"""

import ml_collections
from ml_collections.config_dict import ConfigDict


def get_config() -> ml_collections.ConfigDict:
    """The defaults: 2,000 users on the run that ``make train`` leaves, minutes on 2 CPU cores."""
    config = ml_collections.ConfigDict()
    # Of the users, the slates, the folds and the bootstrap draws. Same seed, same files.
    config.seed = 0
    config.pool = ConfigDict(
        dict(
            # Folder of a run that train.py made, on AIGC-INT-Sim at `features` depth.
            run="runs/quickstart",
            # Folder of its data set, where that moved since; "" takes the one that the run names.
            data="",
            # Which records users show in the rounds: the run's "validation" or "train" splits. Policies learn from what
            # users make of slates for these records, so that test is never among them; no policy reads labels. Of
            # "train" the model is surer than of any record that comes later: only to try settings (ab.split).
            split="validation",
            # Most records taken of a split, from the first; 0 takes all.
            num_records=3000,
        )
    )
    config.visits = ConfigDict(
        dict(
            # Users; the same ones come back in every round.
            num_users=2000,
            # Times that a policy is learned, judged, and deployed or refused.
            num_rounds=4,
            # Visits of each user in a round, a slate each.
            visits_per_round=5,
            # Items of a slate. Weights of decisions multiply over the positions before: long slates need longer logs.
            slate_size=4,
            # Visits of each user that tell a candidate's true simulated value, which only the report reads. Must be
            # visits_per_round unless reward.satisfaction or environment.rating_delay_visits is 0: ratings of the last
            # visits arrive too late, and of more or fewer visits another share would.
            truth_visits=5,
        )
    )
    config.environment = ConfigDict(
        dict(
            # Share of a taste that is new at each visit, in [0, 1] (0 keeps tastes).
            taste_drift=0.05,
            # An item at position p (from 0) is examined with probability (1 + p) ** -exponent.
            position_exponent=0.4,
            # Probability that a user rates a slate.
            rating_probability=0.3,
            # Visits until the rating arrives.
            rating_delay_visits=2,
        )
    )
    config.policies = ConfigDict(
        dict(
            # Divides the model's scores (inner products of F_u and E_c): nearly the best items alone.
            greedy_temperature=0.005,
            # Divides the logarithms of click rates.
            popularity_temperature=0.1,
            # Divides predicted click rates of the matrix factorisation.
            behaviour_temperature=0.01,
            # Factors of a user and of an item.
            behaviour_rank=8,
            # Of squared factors, in views; of several the one that tells a held-out fifth of the clicks best.
            behaviour_penalties=(4.0, 8.0, 16.0),
            # Alternations of least squares.
            behaviour_sweeps=8,
            # Divides predicted rewards of LinUCB and of Thompson sampling.
            bandit_temperature=0.02,
            # Of squared coefficients, in decisions.
            bandit_penalty=1.0,
            # Standard deviations that LinUCB adds to the mean.
            bandit_width=1.0,
            # Standard deviations of the posterior that Thompson sampling draws coefficients from, as a multiple.
            thompson_scale=0.3,
        )
    )
    config.reward = ConfigDict(
        dict(
            # What a shown item is worth: weights of dwell, replays, a like, and the slate's rating, each in [0, 1].
            dwell=0.35,
            replays=0.2,
            like=0.35,
            satisfaction=0.1,
            # Dwell, in seconds, and replays that count as 1.
            full_dwell_seconds=120.0,
            full_replays=3.0,
        )
    )
    config.reward_model = ConfigDict(
        dict(
            # Parts of the users; each part is predicted by a model of the others.
            num_folds=5,
            # Of squared item effects, in decisions.
            penalty=20.0,
        )
    )
    # Share of the users whose visits a round's candidates learn from; the visits of the others judge them.
    config.learning_share = 0.5
    config.learning = ConfigDict(
        dict(
            # "doubly_robust" (a reward model takes the greater part) or "reinforce" (weighted rewards alone).
            gradient="doubly_robust",
            # Of Adam.
            learning_rate=0.01,
            # Gradients.
            num_steps=100,
            # Slates of a gradient; 0: all.
            batch_size=256,
            # Importance weights of an item at its position are clipped at this.
            largest_weight=5.0,
            # Of the divergence from the logging policy, in rewards per nat: the trust region.
            divergence_weight=0.2,
            # Divides the scores of the first policy, MMEI as a softmax, and of all that are learned from it.
            temperature=0.1,
            # Share of their choices that is uniform.
            uniform_share=0.1,
        )
    )
    config.gate = ConfigDict(
        dict(
            # "dm", "ips", "clipped_ips", "snips", "dr", "sndr" or "switch_dr".
            estimator="dr",
            # Of a decision, for "clipped_ips" and "switch_dr".
            largest_weight=10.0,
            # Of the one-sided lower bound of the gain.
            confidence=0.95,
            # By which the bound must exceed 0, in rewards per item.
            least_gain=0.0,
            # Effective sample size over decisions, at least.
            least_effective_share=0.05,
            # Where the mean importance weight must lie; 1 in expectation.
            mean_weight_range=(0.9, 1.1),
            # Draws and seed of the bootstrap over users.
            num_draws=1000,
            seed=0,
        )
    )
    config.ab = ConfigDict(
        dict(
            # Which of the run's records users show here, at most pool.num_records; never pool.split. From its "test"
            # splits nothing was learned. "validation", with pool.split="train", tries settings and leaves test unread:
            # the model's checkpoint was chosen on it, so that such an A/B answers no claim.
            split="test",
            # Visits of each user in each arm and seed.
            num_visits=8,
            # Seeds of the visits; the arms of a seed share its users, moods and chances.
            num_seeds=5,
            # Draws of the bootstrap over users and seeds.
            num_draws=2000,
            # Of the intervals.
            confidence=0.95,
        )
    )
    return config
