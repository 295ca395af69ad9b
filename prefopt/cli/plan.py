"""`prefopt plan`: will a model fit on so many GPUs, by which setting, and how long will it take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from cyclopts import App, Parameter

from losses.suggestions import suggest_option
from prefopt.cli.lookup import find_algorithm
from prefopt.errors import ConfigError
from prefopt.machine import standard_console
from prefopt.models.loading import PACKAGED
from prefopt.report.grid import to_rich
from prefopt.scaling import DEVICES, SHAPES, Strategy, cheapest, read_shape, workload_of
from prefopt.scaling.choice import RANK, fewest
from prefopt.scaling.duration import UTILISATION
from prefopt.scaling.tables import answer, assumed_line, model_line, parts_grid, sizes_grid, times_grid

_HELP = """Will a model fit on so many GPUs, by which setting, and how long will it take. Nothing is loaded or trained.

Bytes and operations follow from the model's shape by the formulas of docs/scaling.md. Of the settings that agree with the \
flags, the one that fits and takes least time is shown, beside the same for 1, 8 and 64 GPUs. \
`prefopt plan --model llama-8b --gpus 8` needs no file and no network."""

# Numbers of GPUs that every plan shows.
_SIZES = (1, 8, 64)


def build(tokens: Sequence[str]) -> App:
    app = App("plan", version_flags=(), help_format="plaintext", help=_HELP)
    app.default(_plan)
    return app


def _plan(
    *,
    model: Annotated[
        str, Parameter(help=f"A folder, its config.json, a GGUF file, {PACKAGED}, or a shape: {', '.join(SHAPES)}.")
    ],
    gpus: Annotated[int, Parameter(help="How many; eight share a machine.")] = 8,
    gpu: Annotated[str, Parameter(help=f"Which: {', '.join(DEVICES)}.")] = "h100",
    algorithm: Annotated[str, Parameter(help="A loss or a sum of losses, as `prefopt train` takes it.")] = "dpo",
    strategy: Annotated[Strategy | None, Parameter(help="How GPUs share the work; chosen if not given.")] = None,
    lora: Annotated[int, Parameter(help="Rank of adapters on every linear layer; 0 trains all weights.")] = 0,
    max_length: Annotated[int, Parameter(help="Prompt plus completion, in tokens; a half each.")] = 1024,
    micro_batch_tokens: Annotated[
        int | None, Parameter(help="Packed tokens of one forward pass on a GPU; chosen if not given.")
    ] = None,
    activation_checkpointing: Annotated[bool, Parameter(help="Always; chosen if not given.")] = False,
    pairs: Annotated[
        int, Parameter(help="Rows that are trained on, all passes together: pairs, or prompts on-policy.")
    ] = 10_000,
    batch_size: Annotated[int, Parameter(help="Rows of one update, on all GPUs together.")] = 64,
    completions: Annotated[int, Parameter(help="Of a row; 0 takes a pair's two, or four samples of a prompt.")] = 0,
    utilisation: Annotated[float, Parameter(help="Share of the GPU's bf16 products that training reaches.")] = UTILISATION,
) -> None:
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation is {utilisation:g}; expected a share above 0 and up to 1.")
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}; expected at least 1.")
    if gpu not in DEVICES:
        raise ConfigError(f"--gpu {gpu}: unknown{suggest_option(gpu, list(DEVICES))}. Known: {', '.join(DEVICES)}.")
    find_algorithm(algorithm)
    shape, device, console = read_shape(model), DEVICES[gpu], standard_console()
    workload = workload_of(algorithm, rows=pairs, batch=batch_size, length=max_length, completions=completions)
    best = partial(
        cheapest, shape, workload, device, tokens=micro_batch_tokens, checkpointing=activation_checkpointing,
        utilisation=utilisation,
    )  # fmt: skip
    choice = best(gpus, strategy=strategy, lora=lora)
    # A strategy of several GPUs says nothing of one, and the other way round.
    others = [best(count, lora=lora) for count in _SIZES if count != gpus]
    choices = sorted([choice, *others], key=lambda each: each.setup.gpus)
    console.print(model_line(shape, workload, lora), highlight=False, soft_wrap=True)
    console.print(to_rich(sizes_grid(f"the cheapest setting that fits, on {gpu}", choices, device)))
    console.print(to_rich(parts_grid(choices)))
    console.print(to_rich(times_grid(choices)))
    adapted = None if choice.fits or lora else best(gpus, strategy=strategy, lora=RANK)
    least = None if choice.fits else fewest(shape, workload, device, lora)
    console.print(assumed_line(utilisation), highlight=False, soft_wrap=True)
    console.print(answer(choice, device, gpu, adapted, least), highlight=False, soft_wrap=True)
