"""A small language model from nothing: a byte-level BPE tokenizer and a Llama of about a million parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

EOS = "<eos>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016 [sennrich2016bpe]); every text has ids. EOS is id 0, and also the pad token.

    A word's first token begins with its space, so a text that is cut before a space is cut between tokens.

    Args:
        texts: to count pairs in; the same texts in the same order give the same tokenizer.
        vocabulary: most tokens, the 256 bytes and EOS included.
    """
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[EOS], initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False)


def small_llama(tokenizer: PreTrainedTokenizerFast, max_length: int, seed: int = 0) -> Any:
    """An untrained Llama for `tokenizer`.

    Args:
        max_length: positions.
        seed: of its weights.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # An embedding at padding_idx gets no gradient, and EOS is the pad token.
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)
