"""A hundred thousand pairs: memory does not grow with them, and the second start only opens what the first one made."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SCRIPT = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.data.token_store import tokenize_stored
from prefopt.machine import peak_memory_mb

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
before, begin = peak_memory_mb(), time.process_time()
records = load([sys.argv[2]], cache=Path(sys.argv[3])).records
policy = split_roles(records).policy
stored = tokenize_stored(policy, tokenizer, max_length=256, max_completion_length=128, cache=Path(sys.argv[3]))
seconds = time.process_time() - begin
print(len(records), stored.report.kept, peak_memory_mb() - before, seconds)
"""


def write_dialogues(path: Path, count: int) -> Path:
    """`count` pairs in Anthropic's format: two hundred dialogues, repeated with edited first turns."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(5_000)]

    def say(most: int) -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(3, most)))

    bodies = [
        (f" {say(40)}\n\nAssistant: {say(60)}\n\nHuman: {say(40)}\n\nAssistant:", f" {say(90)}", f" {say(90)}")
        for _ in range(200)
    ]
    with path.open("w") as file:
        for i in range(count):
            prompt, chosen, rejected = bodies[i % len(bodies)]
            start = f"\n\nHuman: ({i})" + prompt
            file.write(json.dumps({"chosen": start + chosen, "rejected": start + rejected}) + "\n")
    return path


def byte_bpe(folder: Path, data: Path) -> Path:
    """A byte-level BPE of 4,000 entries, trained on a piece of the data."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    with data.open() as file:
        texts = [json.loads(line)["chosen"] for line, _ in zip(file, range(300), strict=False)]
    core.train_from_iterator(texts, BpeTrainer(vocab_size=4_000, special_tokens=["</s>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_and_the_second_start_only_opens_it(tmp_path: Path) -> None:
    data = {count: write_dialogues(tmp_path / f"{count}.jsonl", count) for count in (10_000, 100_000)}
    tokenizer = byte_bpe(tmp_path / "tokenizer", data[10_000])

    def run(count: int) -> tuple[int, int, float, float]:
        command = [sys.executable, "-c", SCRIPT, *map(str, (tokenizer, data[count], tmp_path / "cache"))]
        read, kept, growth, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return int(read), int(kept), float(growth), float(seconds)

    small, large, again = run(10_000), run(100_000), run(100_000)
    assert (small[0], large[0]) == (10_000, 100_000)
    assert 0.6 * large[0] < large[1] < 0.8 * large[0]
    assert again[:2] == large[:2]
    # Everything in memory would be some 20 kB a pair, 2 GB in all.
    assert large[2] < 500
    assert large[2] - small[2] < 100
    # Processor time: other work on the machine must not fail the test.
    assert again[3] < 1.0
    assert again[3] < 0.05 * large[3]
