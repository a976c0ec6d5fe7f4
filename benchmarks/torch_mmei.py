"""MMEI in PyTorch, as one would write it there: the peer of ``fusion_step`` and ``serving``.

The same parameters, losses and update as the package's, converted from its parameters by name. Records are padded rows,
one record each: ``is_token`` says which tokens are there. What is tuned for torch: keys are masked by record (not by
query), projections that read the same tokens are one product, dropout is torch's own.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmei_jax.config import Config
from mmei_jax.models.mmei import Tasks
from mmei_jax.types import MODALITIES

Tensors = dict[str, Any]


class Attention(nn.Module):
    """Multi-head attention; ``joined``: the projections that one product computes, as they read the same tokens."""

    def __init__(self, dim: int, num_heads: int, *, reads_itself: bool):
        super().__init__()
        self.num_heads = num_heads
        self.joined = ("query", "key", "value") if reads_itself else ("key", "value")
        self.projection = nn.Linear(dim, len(self.joined) * dim)
        self.query = None if reads_itself else nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor, has_any: Tensor) -> Tensor:
        """``mask``: ``[batch, 1, 1, keys]``; ``has_any``: ``[batch, 1, 1]``, 0 for a record with nothing to read."""
        rows, num_queries, dim = queries.shape
        parts = [
            part.transpose(1, 2)
            for part in self.projection(context)
            .view(rows, context.shape[1], len(self.joined), self.num_heads, dim // self.num_heads)
            .unbind(2)
        ]
        if self.query is not None:
            own = self.query(queries).view(rows, num_queries, self.num_heads, dim // self.num_heads)
            parts.insert(0, own.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).reshape(rows, num_queries, dim)) * has_any


class FeedForward(nn.Module):
    """Two linear layers, exact GELU."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token on its own."""
        return self.output(F.gelu(self.hidden(x)))


class CrossModalLayer(nn.Module):
    """Self-attention, cross-attention to the others, feed-forward."""

    def __init__(self, config: Any, names: list[str]):
        super().__init__()
        self.names, self.rate = names, config.dropout_rate
        for name in names:
            for norm in ("self", "cross", "feed_forward"):
                self.add_module(f"{name}_{norm}_norm", nn.LayerNorm(config.dim))
            for kind in ("self", "cross"):
                attention = Attention(config.dim, config.num_heads, reads_itself=kind == "self")
                self.add_module(f"{name}_{kind}_attention", attention)
            self.add_module(f"{name}_feed_forward", FeedForward(config.dim, config.feedforward_dim))

    def forward(self, states: Tensors, self_masks: Tensors, cross_masks: Tensors) -> Tensors:
        """The states after the layer; masks as :func:`_key_mask` gives them."""
        get = self.get_submodule
        after = {}
        for name, state in states.items():
            normed = get(f"{name}_self_norm")(state)
            read = get(f"{name}_self_attention")(normed, normed, *self_masks[name])
            after[name] = state + F.dropout(read, self.rate, self.training)
        normed = {name: get(f"{name}_cross_norm")(state) for name, state in after.items()}
        for name in self.names:
            others = torch.cat([normed[other] for other in self.names if other != name], dim=1)
            read = get(f"{name}_cross_attention")(normed[name], others, *cross_masks[name])
            after[name] = after[name] + F.dropout(read, self.rate, self.training)
        for name, state in after.items():
            hidden = get(f"{name}_feed_forward")(get(f"{name}_feed_forward_norm")(state))
            after[name] = state + F.dropout(hidden, self.rate, self.training)
        return after


class Embedding(nn.Module):
    """Eq. 1 with bias, type and position embeddings; features standardised by constants."""

    def __init__(self, config: Any, input_dim: int, max_tokens: int):
        super().__init__()
        self.rate = config.dropout_rate
        self.projection = nn.Linear(input_dim, config.dim)
        self.type_embedding = nn.Parameter(torch.empty(config.dim))
        self.position_embedding = nn.Parameter(torch.empty(max_tokens, config.dim))
        self.register_buffer("mean", torch.zeros(input_dim), persistent=False)
        self.register_buffer("scale", torch.ones(input_dim), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, tokens, dim]``."""
        states = self.projection((features - self.mean) * self.scale)
        states = states + (self.type_embedding + self.position_embedding[: features.shape[1]])
        return F.dropout(states, self.rate, self.training)


class Head(nn.Module):
    """A Transformer layer over [F, v, a, t], read at F, then a linear layer."""

    def __init__(self, config: Any, num_outputs: int):
        super().__init__()
        self.rate = config.dropout_rate
        self.token_embedding = nn.Parameter(torch.empty(1 + len(MODALITIES), config.dim))
        self.layer_0 = nn.ModuleDict(
            {
                "attention_norm": nn.LayerNorm(config.dim),
                "attention": Attention(config.dim, config.num_heads, reads_itself=True),
                "feed_forward_norm": nn.LayerNorm(config.dim),
                "feed_forward": FeedForward(config.dim, config.feedforward_dim),
            }
        )
        self.norm = nn.LayerNorm(config.dim)
        self.logits = nn.Linear(config.dim, num_outputs)

    def forward(self, fused: Tensor, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the state that they are read from."""
        states = torch.cat([fused[:, None], vectors], dim=1) + self.token_embedding
        normed = self.layer_0["attention_norm"](states)
        read = self.layer_0["attention"](normed, normed, mask, torch.ones_like(fused[:, :1, None]))
        states = states + F.dropout(read, self.rate, self.training)
        # Only the state at F is read from here on.
        state = states[:, 0]
        hidden = self.layer_0["feed_forward"](self.layer_0["feed_forward_norm"](state))
        state = self.norm(state + F.dropout(hidden, self.rate, self.training))
        return self.logits(state), state


class TorchMmei(nn.Module):
    """The whole model, for the tasks of ``configs/default.py``: emotion and intent softmax, in-batch ranking."""

    def __init__(self, config: Config, tasks: Tasks):
        super().__init__()
        model = config.model
        self.config, self.names = config, list(tasks.inputs())
        for name, given in tasks.inputs().items():
            self.add_module(f"embed_{name}", Embedding(model, given.feature_dim, given.max_positions))
        self.cross_modal = nn.ModuleDict()
        for index in range(model.num_layers):
            self.cross_modal[f"layer_{index}"] = CrossModalLayer(model, self.names)
        for name in self.names:
            self.cross_modal[f"{name}_norm"] = nn.LayerNorm(model.dim)
        self.weighting = nn.ModuleDict()
        for name in self.names:
            self.weighting[f"{name}_scorer_hidden"] = nn.Linear(model.dim, model.dim)
            self.weighting[f"{name}_scorer_output"] = nn.Linear(model.dim, 1, bias=False)
        self.emotion_head = Head(model, tasks.num_emotions)
        self.intent_head = Head(model, tasks.num_intents or 0)
        self.user_projection = nn.Linear(3 * model.dim, model.embedding_dim)
        self.content_tower = nn.Module()
        self.content_tower.projection = nn.Linear(tasks.item_dim, model.embedding_dim)
        self.content_tower.kind_embedding = nn.Parameter(torch.empty(tasks.num_kinds, model.embedding_dim))

    def forward(self, batch: Tensors) -> Tensor:
        """The loss of Eq. 6. ``batch``: see :func:`to_torch`."""
        emotion, intent, users = self.read(batch)
        items = self.content_tower.projection(batch["item_features"])
        items = items + self.content_tower.kind_embedding[batch["item_kind"]]
        return self._loss(emotion, intent, users, items, batch)

    def read(self, batch: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of emotion and of intent, and F_u before it has unit length; ``features`` and ``is_token`` suffice."""
        is_token = {name: batch["is_token"][name] for name in self.names}
        if self.training and self.config.model.modality_dropout_rate > 0.0:
            is_token = self._hide_modalities(is_token)
        self_masks = {name: _key_mask(tokens) for name, tokens in is_token.items()}
        cross_masks = {
            name: _key_mask(torch.cat([is_token[other] for other in self.names if other != name], dim=1))
            for name in self.names
        }
        states = {name: self.get_submodule(f"embed_{name}")(batch["features"][name]) for name in self.names}
        for index in range(self.config.model.num_layers):
            states = self.cross_modal[f"layer_{index}"](states, self_masks, cross_masks)
        vectors, scores = [], []
        for name in self.names:
            weights = is_token[name] / is_token[name].sum(dim=1, keepdim=True).clamp(min=1)
            pooled = torch.bmm(weights[:, None], self.cross_modal[f"{name}_norm"](states[name]))[:, 0]
            vectors.append(pooled)
            hidden = torch.tanh(self.weighting[f"{name}_scorer_hidden"](pooled))
            scores.append(self.weighting[f"{name}_scorer_output"](hidden))
        is_present = torch.stack([is_token[name].any(dim=1) for name in self.names], dim=1)
        # bfloat16, where products give it, does not hold float32's least number.
        score = torch.cat(scores, dim=1).float().masked_fill(~is_present, torch.finfo(torch.float32).min)
        alpha = torch.softmax(score, dim=1)
        stacked = torch.stack(vectors, dim=1)
        fused = (alpha[..., None] * stacked).sum(dim=1)
        head_mask = F.pad(is_present, (1, 0), value=True)[:, None, None]
        emotion, emotion_state = self.emotion_head(fused, stacked, head_mask)
        intent, intent_state = self.intent_head(fused, stacked, head_mask)
        users = self.user_projection(torch.cat([fused, emotion_state, intent_state], dim=1))
        return emotion, intent, users

    def _loss(self, emotion: Tensor, intent: Tensor, users: Tensor, items: Tensor, batch: Tensors) -> Tensor:
        loss = self.config.loss
        recognition = F.cross_entropy(emotion.float(), batch["emotion"]) + F.cross_entropy(
            intent.float(), batch["intent"]
        )
        users, items = (F.normalize(each.float(), dim=1) for each in (users, items))
        scores = users @ items.T / loss.temperature - batch["log_sampling_probability"][None]
        index = batch["positive_index"]
        is_hit = (index[:, None] == index[None]) & ~torch.eye(len(index), dtype=torch.bool, device=index.device)
        scores = scores.masked_fill(is_hit, torch.finfo(torch.float32).min)
        ranking = F.cross_entropy(scores, torch.arange(len(index), device=index.device))
        return loss.recognition_weight * recognition + loss.ranking_weight * ranking

    def _hide_modalities(self, is_token: Tensors) -> Tensors:
        is_present = torch.stack([is_token[name].any(dim=1) for name in self.names], dim=1)
        draws = torch.rand(is_present.shape, device=is_present.device).masked_fill(~is_present, -1.0)
        is_kept = (draws >= self.config.model.modality_dropout_rate) | (draws == draws.amax(dim=1, keepdim=True))
        return {name: is_token[name] & is_kept[:, index, None] for index, name in enumerate(self.names)}


def _key_mask(is_token: Tensor) -> tuple[Tensor, Tensor]:
    """What :class:`Attention` takes: a record without keys reads all of them, and its answer is multiplied by 0."""
    has_any = is_token.any(dim=1, keepdim=True)
    return (is_token | ~has_any)[:, None, None], has_any[:, :, None].to(torch.float32)


def load_parameters(model: TorchMmei, parameters: Any) -> None:
    """Copies the package's parameters (a nested dict of arrays) by name; every one of both sides is used once."""
    joined: dict[str, Tensor] = {}
    for path, leaf in _flatten(parameters).items():
        *modules, last = path
        name = ".".join([*modules, {"kernel": "weight", "scale": "weight"}.get(last, last)])
        value = torch.tensor(np.asarray(leaf))
        joined[name] = value.T.contiguous() if last == "kernel" else value
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            for kind in ("weight", "bias"):
                parts = [joined.pop(f"{name}.{part}.{kind}") for part in module.joined]
                joined[f"{name}.projection.{kind}"] = torch.cat(parts)
    model.load_state_dict(joined, strict=True)


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        found |= _flatten(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
    return found


def make_optimizer(model: TorchMmei, config: Config, **implementation: bool) -> torch.optim.AdamW:
    """AdamW that decays what the package's decays: weights of linear layers and convolutions.

    What is frozen is left out. A group's ``rate_multiplier`` is what ``optimizer.rate_multipliers`` says of it: whoever
    sets the group's rate multiplies by it.
    """
    optimizer = config.optimizer
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    # In the package's words.
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, layers)}

    def multiplier(name: str) -> float:
        name = name.replace(".", "/")
        return next((factor for pattern, factor in optimizer.rate_multipliers if re.search(pattern, name)), 1.0)

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = optimizer.weight_decay if id(parameter) in kernels else 0.0
            groups.setdefault((decay, multiplier(name)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": own,
                "weight_decay": decay,
                "lr": optimizer.learning_rate * factor,
                "rate_multiplier": factor,
            }
            for (decay, factor), own in groups.items()
        ],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=1e-8,
        **implementation,
    )


def to_torch(batch: Any, device: str) -> Tensors:
    """A host batch of the package, one record a row, every record labelled, as tensors.

    ``features`` (or raw tokens) and ``is_token`` by modality, ``emotion``, ``intent``, ``item_features``,
    ``item_kind``, ``positive_index``, ``log_sampling_probability``.
    """

    def tensor(array: Any) -> Tensor:
        found = torch.from_numpy(np.asarray(array)).to(device)
        return found.long() if found.dtype == torch.int32 else found

    ranking = batch.ranking
    return {
        "features": {name: tensor(each.features) for name, each in batch.sequences().items()},
        "is_token": {name: tensor(each.segment_ids) > 0 for name, each in batch.sequences().items()},
        "emotion": tensor(batch.emotion.value),
        "intent": tensor(batch.intent.value),
        "item_features": tensor(ranking.positive.features),
        "item_kind": tensor(ranking.positive.kind),
        "positive_index": tensor(ranking.positive_index),
        "log_sampling_probability": tensor(ranking.log_sampling_probability),
    }
