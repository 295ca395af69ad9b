"""Reward models on disk: the sequence-classification layout of Hugging Face, with one label.

The folder is read by `AutoModelForSequenceClassification`, which scores the last token that is not padding. So the padding
must never end a completion: where a tokenizer pads with its EOS, another token is named for it. LoRA adapters are merged.
What a scorer knows besides is `prefopt_reward` in config.json: its limits of length, and the offset that centres its scores;
what transformers computes minus the offset is our score.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.data.records import Example
from prefopt.engines import merged_weights
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.loading import load_model
from prefopt.rewards.scorers import RewardModelScorer

ENTRY = "prefopt_reward"
"""Of config.json: `offset`, `max_length` and `max_completion_length` of the scorer."""
_LABEL = "reward"
_PAD = "<|reward_pad|>"
# For models that do not say how long their context is.
_CONTEXT = 4096


def save_reward_model(scorer: RewardModelScorer, folder: Path) -> None:
    """Writes backbone, reward head and tokenizer; the LM head is left out.

    Args:
        scorer: adapters are merged in what is written, not in its policy.
        folder: made if need be.

    Raises:
        ConfigError: no reward head, or transformers has no sequence classifier for this architecture.
    """
    policy = scorer.policy
    if "reward" not in policy.heads:
        raise ConfigError("this policy has no reward head: build it with heads=('reward',).")
    tokenizer = copy.deepcopy(policy.tokenizer)
    with policy.plain_attention():
        model = _classifier(policy)
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = _choose_padding(tokenizer, model)
        setattr(model.config, ENTRY, {"offset": scorer.offset, **scorer.limits})
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_reward_model(
    name: str,
    *,
    cache: Path,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    micro_batch_tokens: int = 8192,
) -> RewardModelScorer:
    """A scorer from a folder or hub id in the sequence-classification layout, ours or another's, with its own tokenizer.

    Texts may be as long as the model's context, or as it was trained here.

    Raises:
        ConfigError: no reward model: several labels, another head than one linear layer, a causal LM; or one whose scores
            the shared forward does not reproduce.
        HubError: as `load_model`.
    """
    try:
        found = load_model(name, cache=cache, device=device, trust_remote_code=trust_remote_code, classifier=True)
    except ConfigError as error:
        raise ConfigError(f"as a reward model (sequence classifier with one label): {error}") from error
    classifier, config = found.model, found.model.config
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        what = (
            f"{head.out_features} labels"
            if isinstance(head, nn.Linear)
            else f"no linear layer named 'score' ({type(head).__name__})"
        )
        kind = type(classifier).__name__
        raise ConfigError(f"reward model {name!r}: expected a sequence classifier with one label, got {kind} with {what}.")
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or _CONTEXT
    known = getattr(config, ENTRY, {})
    offset = known.get("offset", 0.0)
    probe, expected = _probe(classifier)
    policy = CausalLMPolicy(_as_causal_lm(classifier), found.tokenizer, heads=("reward",))
    policy.heads["reward"].load_state_dict({"weight": head.weight})
    bias = 0.0 if head.bias is None else float(head.bias.detach())
    scorer = RewardModelScorer(
        policy, max_length=min(context, known.get("max_length", context)), offset=offset - bias,
        max_completion_length=known.get("max_completion_length"), micro_batch_tokens=micro_batch_tokens,
        pad_id=config.get_text_config().pad_token_id,
    )  # fmt: skip
    got, expected = float(scorer.score([probe])), expected - offset
    # An architecture whose attention differs from what the shared forward computes would be wrong silently.
    if abs(got - expected) > max(1.0, abs(expected)) * (1e-3 if policy.device.type == "cpu" else 5e-2):
        raise ConfigError(
            f"reward model {name!r}: transformers scores a probe {expected:.5g}, the shared forward {got:.5g}; this "
            "architecture is not supported. Use it through a function of your own: --reward path/to/file.py:function."
        )
    return scorer


def _classifier(policy: CausalLMPolicy) -> Any:
    """transformers' sequence classifier with the policy's weights, those of adapted layers merged."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(policy.base.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: _LABEL}, {_LABEL: 0}
    config.problem_type = "regression"
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise ConfigError(
            f"transformers has no sequence classifier for {type(policy.base).__name__}, so its reward model cannot be saved."
        ) from error
    weights = {name: weight for name, weight in merged_weights(policy) if name in model.state_dict()}
    head = policy.heads["reward"].state_dict()["weight"].to(policy.dtype)
    model.load_state_dict({**weights, "score.weight": head}, assign=True)
    return model


def _choose_padding(tokenizer: Any, model: Any) -> int:
    """A padding token that ends no completion: the tokenizer's own, its unknown token, or a new one; set in the tokenizer."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        unknown = tokenizer.unk_token
        own = unknown is not None and tokenizer.unk_token_id != tokenizer.eos_token_id
        tokenizer.add_special_tokens({"pad_token": unknown if own else _PAD})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    return int(tokenizer.pad_token_id)


def _as_causal_lm(classifier: Any) -> Any:
    """A causal LM around the classifier's backbone: the shared forward's model. Its LM head is the input embedding, unused."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(classifier.config))
    setattr(model, model.base_model_prefix, getattr(classifier, classifier.base_model_prefix))
    embedding = model.get_input_embeddings().weight
    head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
    head.weight = embedding
    model.set_output_embeddings(head)
    return model.eval()


@torch.no_grad()
def _probe(classifier: Any) -> tuple[Example, float]:
    """A few tokens that are no padding, and transformers' score of them."""
    text = classifier.config.get_text_config()
    ids = [token for token in range(min(9, text.vocab_size)) if token != text.pad_token_id]
    score = classifier(input_ids=torch.tensor([ids], device=classifier.device)).logits
    return Example("probe", tuple(ids[:1]), (tuple(ids[1:]),)), float(score)
