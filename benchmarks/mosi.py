"""How well does MMEI tell positive from negative on CMU-MOSI, by video, beside a ridge classifier on the same inputs?

    python -m benchmarks.mosi --input=PATH/utterances.npz --workdir=runs/mosi [--quick]

559 utterances of 23 videos, one vector per modality; five folds of whole videos, as benchmarks/fold_study.py deals
with them. A control has its labels shuffled within each video: only how positive a video is may be learned from it.
"""

import sys

from sklearn.linear_model import RidgeClassifier

from benchmarks import fold_study
from configs import mosi

STUDY = fold_study.Study(
    name="mosi",
    input_name="utterances.npz",
    get_config=mosi.get_config,
    label="sentiment",
    import_flags=(
        "--id_key=segment_id",
        "--user_key=video_id",
        "--group_key=video_id",
        "--labels=sentiment",
        "--class_names=negative,positive",
        "--source=CMU-MOSI, 23 videos; features of declare-lab/multimodal-deep-learning (bc-LSTM)",
        "--licence=research use",
    ),
    num_folds=5,
    inputs={
        "text": ("text",),
        "audio": ("audio",),
        "vision": ("vision",),
        fold_study.ALL_INPUTS: ("vision", "audio", "text"),
    },
    comparisons=((fold_study.ALL_INPUTS, "text"),),
    peer_name="ridge classifier, scikit-learn, standardised, alpha of 1, 10, 100, 1000 chosen on validation",
    make_peers=lambda: tuple(RidgeClassifier(alpha=alpha) for alpha in (1.0, 10.0, 100.0, 1000.0)),
)


if __name__ == "__main__":
    sys.exit(fold_study.run(STUDY, __doc__))
