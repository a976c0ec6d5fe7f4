"""BERT of base size: its gradients against Hugging Face's; bert_test.py has its outputs, and the small sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmei_jax.encoders.bert import Bert
from tests import hugging_face


@pytest.mark.slow
def test_gradients_of_base_size_equal_hugging_face():
    model = hugging_face.randomised(transformers.BertModel(transformers.BertConfig()))
    converted = hugging_face.converted(model)
    config = converted.config
    generator = np.random.default_rng(0)
    mask = np.arange(19) < np.array([[19], [1], [8]])
    # Torch gives the entry 0, its padding, no gradient.
    token_ids = generator.integers(1, config.vocabulary_size, mask.shape, dtype=np.int32)
    token_type_ids = generator.integers(0, config.num_token_types, mask.shape, dtype=np.int32)
    weights = generator.normal(size=(*mask.shape, config.stack.dim)).astype(np.float32) * mask[..., None]
    pooled_weights = generator.normal(size=(len(mask), config.stack.dim)).astype(np.float32)

    @jax.jit
    @jax.grad
    def differentiate(parameters):
        outputs = Bert(config).apply({"params": parameters}, token_ids, mask.astype(np.int32), token_type_ids)
        return jnp.sum(outputs.last_hidden_state * weights) + jnp.sum(outputs.pooled * pooled_weights)

    inputs = dict(input_ids=token_ids, attention_mask=mask, token_type_ids=token_type_ids)
    expected = model(**{name: torch.tensor(array, dtype=torch.long) for name, array in inputs.items()})
    loss = (expected.last_hidden_state * torch.tensor(weights)).sum()
    (loss + (expected.pooler_output * torch.tensor(pooled_weights)).sum()).backward()
    hugging_face.assert_gradients_agree(differentiate(converted.parameters), model)
