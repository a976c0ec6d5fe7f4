"""What the report on a feedback loop says in words, in every case that its numbers can make."""

import pytest

from mmei_jax.reports import feedback_report
from mmei_jax.reports.feedback_report import uplift_lines

UNDEFINED = (None, None, None)
UPLIFT, NOTHING, LOSS = (0.06, 0.05, 0.07), (0.01, -0.01, 0.03), (-0.06, -0.07, -0.05)


def bounded(found):
    return dict(zip(("value", "low", "high"), found, strict=True))


def ab(treatment, placebo, *, is_lost=False):
    metrics = ("dwell_seconds", "satisfaction")
    arms = {"emotion_driven": bounded(treatment), "placebo": bounded(placebo)}
    return {
        "uplift": {arm: dict.fromkeys(metrics, found) for arm, found in arms.items()},
        "placebo_loses_uplift": dict.fromkeys(metrics, is_lost),
    }


@pytest.mark.parametrize(
    ("treatment", "placebo", "is_lost", "expected"),
    [
        (UPLIFT, (-0.1, -0.11, -0.09), True, "an uplift; placebo: -10.0 % [-11.0, -9.0], which loses the uplift"),
        (UPLIFT, (0.0, -0.01, 0.01), True, "an uplift; placebo: +0.0 % [-1.0, +1.0], which loses the uplift"),
        (
            UPLIFT,
            (0.02, 0.01, 0.03),
            False,
            "an uplift; placebo: +2.0 % [+1.0, +3.0], which is below emotion-driven and has an uplift too: it does not "
            "lose the uplift",
        ),
        (
            UPLIFT,
            UPLIFT,
            False,
            "an uplift; placebo: +6.0 % [+5.0, +7.0], which cannot be told from emotion-driven and has an uplift too: "
            "it does not lose the uplift",
        ),
        (
            UPLIFT,
            (0.04, -0.01, 0.06),
            False,
            "an uplift; placebo: +4.0 % [-1.0, +6.0], which cannot be told from emotion-driven: it is not shown to "
            "lose the uplift",
        ),
        (
            UPLIFT,
            (0.1, 0.09, 0.11),
            False,
            "an uplift; placebo: +10.0 % [+9.0, +11.0], which is above emotion-driven and has an uplift too: it does "
            "not lose the uplift",
        ),
        (
            NOTHING,
            (-0.1, -0.11, -0.09),
            False,
            "neither an uplift nor a loss beyond doubt; placebo: -10.0 % [-11.0, -9.0], which is below emotion-driven; "
            "there is no uplift to lose",
        ),
        (
            NOTHING,
            NOTHING,
            False,
            "neither an uplift nor a loss beyond doubt; placebo: +1.0 % [-1.0, +3.0], which cannot be told from "
            "emotion-driven; there is no uplift to lose",
        ),
        (
            NOTHING,
            (0.1, 0.09, 0.11),
            False,
            "neither an uplift nor a loss beyond doubt; placebo: +10.0 % [+9.0, +11.0], which is above emotion-driven; "
            "there is no uplift to lose",
        ),
        (
            LOSS,
            (-0.1, -0.11, -0.09),
            False,
            "a loss; placebo: -10.0 % [-11.0, -9.0], which is below emotion-driven; there is no uplift to lose",
        ),
        (
            LOSS,
            LOSS,
            False,
            "a loss; placebo: -6.0 % [-7.0, -5.0], which cannot be told from emotion-driven; there is no uplift to "
            "lose",
        ),
        (
            LOSS,
            (0.0, -0.01, 0.01),
            False,
            "a loss; placebo: +0.0 % [-1.0, +1.0], which is above emotion-driven; there is no uplift to lose",
        ),
        (UNDEFINED, NOTHING, False, "no answer; placebo: +1.0 % [-1.0, +3.0], no answer"),
        (UPLIFT, UNDEFINED, False, "an uplift; placebo: undefined, no answer"),
    ],
)
def test_an_uplift_and_its_placebo_are_told_as_they_are(treatment, placebo, is_lost, expected):
    lines = uplift_lines(ab(treatment, placebo, is_lost=is_lost))
    papers = ("+15.2", "+11.8")
    for line, name, paper in zip(lines, ("engagement time", "satisfaction"), papers, strict=True):
        assert line.startswith(f"{name} in online evaluation, emotion-driven over behaviour only: ")
        assert line.split(f" (paper: {paper} %), ")[1] == expected


def loop(*rounds):
    """Rounds, each by the deployed policy's true value, the candidate's, and whether that was promoted."""
    results, deployed = [], "mmei_softmax-0"
    for number, (current, candidate, is_promoted) in enumerate(rounds):
        deployed = f"mmei_learned-{number + 1}" if is_promoted else deployed
        results.append(
            {
                "current": {"truth": {"value": current, "standard_error": 0.01}},
                "candidates": [
                    {
                        "truth": {"value": candidate, "standard_error": 0.02},
                        "gate": {"is_promoted": is_promoted},
                    }
                ],
                "deployed": deployed,
            }
        )
    return results


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (
            [(0.33, 0.36, False)],
            "The gate refused 1 candidate, and nothing was deployed: `mmei_softmax-0` still fills the slates. Its "
            "reward per shown item is 0.3300 ± 0.0100 at the first round's visits.",
        ),
        (
            [(0.33, 0.36, False), (0.31, 0.4, False)],
            "The gate refused 2 candidates, and nothing was deployed: `mmei_softmax-0` still fills the slates. Its "
            "reward per shown item is 0.3300 ± 0.0100 at the first round's visits, and 0.3100 ± 0.0100 at the last "
            "one's.",
        ),
        (
            [(0.33, 0.36, True), (0.35, 0.4, False)],
            "Of 2 candidates the gate promoted 1. Reward per shown item in the simulator: 0.3300 ± 0.0100 of the first "
            "policy at the first round's visits, 0.3500 ± 0.0100 of `mmei_learned-1`, the last one deployed, at the "
            "last round's.",
        ),
        (
            [(0.33, 0.36, False), (0.31, 0.3, True)],
            "Of 2 candidates the gate promoted 1. Reward per shown item in the simulator: 0.3300 ± 0.0100 of the first "
            "policy at the first round's visits, 0.3000 ± 0.0200 of `mmei_learned-2`, the last one deployed, at the "
            "last round's.",
        ),
    ],
)
@pytest.mark.parametrize("ab_split", ["test", "validation"])
def test_what_was_found_tells_deployments_uplifts_and_where_the_checkpoint_was_chosen(rounds, expected, ab_split):
    source = {"split": "train", "dataset": "aigc", "run": "runs/some", "checkpoint_step": 7, "ab_split": ab_split}
    for treatment, placebo, is_lost in ((UPLIFT, LOSS, True), (NOTHING, LOSS, False), (LOSS, NOTHING, False)):
        found = ab(treatment, placebo, is_lost=is_lost)
        section = feedback_report._finding({"rounds": loop(*rounds), "source": source}, found)
        simulated, deployments, engagement, satisfaction, *rest = section.blocks
        assert simulated.startswith("> Simulated: ")
        assert deployments == expected
        told = [f"{line[0].upper()}{line[1:]}." for line in uplift_lines(found)]
        assert [engagement, satisfaction] == told
        assert [line.startswith("The model's checkpoint was chosen") for line in rest] == [True] * (ab_split != "test")
