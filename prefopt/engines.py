"""What draws rollouts: the project's own decoding, or vLLM behind the extra of that name, chosen by a flag.

An engine is told the policy's weights before it draws from them (`sync`); log-probs are always taken by the shared forward, so
an engine only has to draw from the distribution that it says.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from prefopt.errors import ConfigError, TrainingError
from prefopt.generate import Decoding, Sample, generate
from prefopt.models.causal_lm import CausalLMPolicy

EngineName = Literal["own", "vllm"]


class Engine(Protocol):
    """Draws completions."""

    def sync(self, policy: CausalLMPolicy) -> None:
        """Takes over the policy's weights, adapters included; called after updates, before the next `generate`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        seed: int,
        samples_per_prompt: int = 1,
        only: Sequence[int] | None = None,
    ) -> list[Sample]:
        """Completions in the order of `prefopt.generate.generate`; the same seed and weights give the same samples.

        Args:
            prompts: token ids, each at least one.
            decoding: temperature, nucleus, limit.
            seed: of the draws.
            samples_per_prompt: K, drawn independently.
            only: places of the prompts that are sampled here, as if all were; None is all.
        """


class OwnEngine:
    """`prefopt.generate` on the live policy.

    Args:
        eos_ids: tokens that end a completion.
    """

    def __init__(self, eos_ids: Sequence[int]) -> None:
        self._eos_ids = tuple(eos_ids)
        self._policy: CausalLMPolicy | None = None

    def sync(self, policy: CausalLMPolicy) -> None:
        """Nothing is copied: later updates of the policy are seen even without another call."""
        self._policy = policy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        seed: int,
        samples_per_prompt: int = 1,
        only: Sequence[int] | None = None,
    ) -> list[Sample]:
        """See `Engine.generate`."""
        generator = torch.Generator().manual_seed(seed)
        return generate(
            _synced(self._policy),
            prompts,
            decoding,
            generator,
            eos_ids=self._eos_ids,
            samples_per_prompt=samples_per_prompt,
            only=only,
        )


class VllmEngine:
    """vLLM in the trainer's process, on the policy's GPU. Not run by this project's tests against a real vLLM.

    The engine is built at the first `sync`, from the policy's merged weights in a temporary folder; later ones hand the weights
    to the engine's own `load_weights` through `LLM.apply_model` and drop its cached prefixes, which belong to old weights.

    Args:
        eos_ids: tokens that end a completion.
        memory_share: of the GPU's memory that the engine may take, beside the trainer.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, eos_ids: Sequence[int], *, memory_share: float = 0.3) -> None:
        # Weights are handed over in memory: the engine must not move to a process of its own, which it does by default.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError(
                "engine 'vllm' needs the 'vllm' extra, on a machine with a CUDA GPU: pip install -e '.[vllm]'; or sample with "
                "--engine own."
            ) from error
        self._eos_ids = tuple(eos_ids)
        self._memory_share = memory_share
        self._llm: Any = None

    def sync(self, policy: CausalLMPolicy) -> None:
        """See `Engine.sync`."""
        if self._llm is None:
            self._llm = self._build(policy)
            return
        self._llm.apply_model(lambda model: model.load_weights(merged_weights(policy)))
        self._llm.reset_prefix_cache()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        seed: int,
        samples_per_prompt: int = 1,
        only: Sequence[int] | None = None,
    ) -> list[Sample]:
        """See `Engine.generate`.

        Raises:
            ConfigError: top_p is not 1: the nucleus is kept with the rollout, and vLLM does not return it.
            TrainingError: a completion ended by itself without one of the EOS tokens.
        """
        _refuse_nucleus(decoding)
        places = range(len(prompts)) if only is None else only
        # A seed of its own for every prompt: with one for all, equal prompts would draw equal samples.
        parameters = [
            self._vllm.SamplingParams(
                n=samples_per_prompt,
                temperature=decoding.temperature,
                max_tokens=decoding.max_new_tokens,
                seed=(seed + i * samples_per_prompt) % 2**63,
                stop_token_ids=list(self._eos_ids),
                ignore_eos=True,  # of the model's folder: only the tokens above end a completion
                detokenize=False,
            )
            for i in places
        ]
        asked = [{"prompt_token_ids": list(prompts[i])} for i in places]
        answers = _synced(self._llm).generate(asked, sampling_params=parameters, use_tqdm=False)
        return [self._sample(output) for answer in answers for output in answer.outputs]

    def _sample(self, output: Any) -> Sample:
        ids, finished = tuple(output.token_ids), output.finish_reason == "stop"
        if finished and (not ids or ids[-1] not in self._eos_ids):
            raise TrainingError(
                f"engine 'vllm' says that a completion ended by itself, but its last token {ids[-1:]} is none of the EOS "
                f"tokens {self._eos_ids} that it was given; this version of vLLM cannot be used here. Sample with --engine own."
            )
        return Sample(ids, finished, None)

    def _build(self, policy: CausalLMPolicy) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            save_merged(policy, folder)
            return self._vllm.LLM(
                model=folder,
                dtype=str(policy.dtype).removeprefix("torch."),
                gpu_memory_utilization=self._memory_share,
                generation_config="vllm",  # no sampling defaults from the model's folder
            )


def build_engine(name: str, eos_ids: Sequence[int], decoding: Decoding) -> Engine:
    """The engine of that name, for draws of that kind.

    Raises:
        ConfigError: no such engine, its extra is missing, or it cannot draw so.
    """
    if name == "own":
        return OwnEngine(eos_ids)
    if name == "vllm":
        _refuse_nucleus(decoding)
        return VllmEngine(eos_ids)
    raise ConfigError(f"unknown engine {name!r}; known: 'own', 'vllm'.")


@torch.no_grad()
def merged_weights(policy: CausalLMPolicy) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the model with its adapters merged, under the model's own names. The policy is left as it is.

    Merging in place and back would leave rounding in the frozen weights.
    """
    modules = dict(policy.base.named_modules())
    for name, weight in policy.base.named_parameters():
        if ".lora_" in name:
            continue
        owner = name.rpartition(".base_layer.")[0]
        if owner and name.endswith(".weight") and not modules[owner].disable_adapters:
            layer = modules[owner]
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight.detach()


def save_merged(policy: CausalLMPolicy, folder: str) -> None:
    """The merged model and the tokenizer in the Hugging Face layout."""
    with policy.plain_attention():
        policy.base.save_pretrained(folder, state_dict={name: weight.cpu() for name, weight in merged_weights(policy)})
    if policy.tokenizer is not None:
        policy.tokenizer.save_pretrained(folder)


def _refuse_nucleus(decoding: Decoding) -> None:
    if decoding.top_p != 1:
        raise ConfigError(
            f"engine 'vllm' draws from the whole distribution: top_p must be 1, got {decoding.top_p}. Log-probs inside a "
            "nucleus need the nucleus itself, which vLLM does not return; sample with --engine own."
        )


def _synced(held: Any) -> Any:
    if held is None:
        raise ConfigError("the engine has no weights yet: call sync(policy) before generate.")
    return held
