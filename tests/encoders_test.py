"""The encoders' public names, and the examples of their page."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import EntryNotFoundError

from mmei_jax import encoders
from tests import hugging_face

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/encoders.md").read_text(encoding="utf-8")


def test_every_public_name_is_there_and_known_to_type_checkers():
    tree = ast.parse(Path(encoders.__file__).read_text(encoding="utf-8"))
    declared = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mmei_jax")
        for alias in node.names
    }
    assert declared == set(encoders.__all__) == set(dir(encoders))
    for name in encoders.__all__:
        assert getattr(encoders, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Gpt'"):
        _ = encoders.Gpt


def test_a_transformer_block_does_not_load_the_tools_that_read_checkpoints():
    program = (
        "import sys\n"
        "import mmei_jax.encoders.transformer\n"
        "assert not {'huggingface_hub', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "from mmei_jax.encoders import Bert\n"
        "assert not {'huggingface_hub', 'safetensors', 'transformers', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    # Tiny models stand in for the hub's.
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    models = {
        "google-bert/bert-base-uncased": transformers.BertModel(transformers.BertConfig(**size)),
        "facebook/wav2vec2-base-960h": transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(**size, conv_dim=(8,) * 7, num_conv_pos_embeddings=4)
        ),
    }
    for repository, model in models.items():
        hugging_face.randomised(model).save_pretrained(tmp_path / "cache" / repository / "c0ffee")

    def hf_hub_download(repository, name, revision=None):
        path = tmp_path / "cache" / repository / "c0ffee" / name
        if not path.is_file():
            raise EntryNotFoundError(name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.chdir(tmp_path)
    first, *others = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(first, "docs/encoders.md", "exec"), names)
    assert capsys.readouterr().out.splitlines() == ["(2, 7, 16)", "(4, 16)", "(4, 16)"]
    assert not names["outputs"].pooled[3].any()
    for code in others:
        exec(compile(code, "docs/encoders.md", "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "(4, 16)",
        "81% of the places hold a token",
        "[(49, 16), (1, 16), (16, 16), (51, 16), (15, 16)]",
        "99% of the places hold a sample",
        "(32, 16)",
    ]
    assert [len(batch.record_index) for batch in names["audio"].batches] == [2, 2, 1]


def test_command_of_the_page_is_the_real_one():
    (command,) = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert re.fullmatch(r"python -m mmei_jax\.encoders\.pretrained \S+ \S+\n", command)
    done = subprocess.run(
        [sys.executable, "-m", "mmei_jax.encoders.pretrained", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "source" in done.stdout
    assert "--revision" in done.stdout
