"""How well does MMEI read emotion from RAVDESS, by actor, beside logistic regression on the same inputs?

    python -m benchmarks.ravdess --input=PATH/actors_01_18.npz --workdir=runs/ravdess [--quick]

Six actor folds, as benchmarks/fold_study.py deals with them. Text is one of two fixed sentences and carries no emotion:
it must not help. A control has its labels shuffled within each actor: nothing may be learned from it.
"""

import sys

from sklearn.linear_model import LogisticRegression

from benchmarks import fold_study
from configs import ravdess

STUDY = fold_study.Study(
    name="ravdess",
    input_name="actors_01_18.npz",
    get_config=ravdess.get_config,
    label="emotion",
    import_flags=(
        "--id_key=clip_id",
        "--user_key=actor",
        "--group_key=actor",
        "--labels=emotion",
        "--class_names=neutral,calm,happy,sad,angry,fearful,disgust,surprised",
        "--source=RAVDESS speech, actors 1-18",
        "--licence=CC BY-NC-SA 4.0",
    ),
    num_folds=6,
    inputs={
        "text": ("text",),
        "audio": ("audio",),
        "vision": ("vision",),
        "audio + vision": ("vision", "audio"),
        fold_study.ALL_INPUTS: ("vision", "audio", "text"),
    },
    comparisons=((fold_study.ALL_INPUTS, "audio + vision"),),
    peer_name="multinomial logistic regression, scikit-learn, standardised, C of 0.001 to 1 chosen on validation",
    make_peers=lambda: tuple(LogisticRegression(C=strength, max_iter=2000) for strength in (1.0, 0.1, 0.01, 0.001)),
)


if __name__ == "__main__":
    sys.exit(fold_study.run(STUDY, __doc__))
