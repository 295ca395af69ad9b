"""A plan as tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.report.grid import Column, Entry, Grid
from prefopt.scaling.choice import Choice
from prefopt.scaling.devices import GIB, Device
from prefopt.scaling.shape import Shape
from prefopt.scaling.workload import Workload

# Parts of a footprint in the order in which they are read, by their fields.
_PARTS = (
    "weights", "casts", "gathered", "gradients", "optimizer", "reference", "reward_model", "activations", "head", "whole",
    "cache",
)  # fmt: skip


def sizes_grid(title: str, choices: Sequence[Choice], device: Device) -> Grid:
    """A row for each number of GPUs: the cheapest setup, what it needs of one GPU, and how long it takes."""
    columns = ("GPUs", "setup", "GiB of one GPU", "fits", "hours", "GPU hours")
    rows = []
    for choice in choices:
        setup, hours = choice.setup, choice.duration.total / 3600
        spent = (f"{hours:.3g}", f"{hours * setup.gpus:.3g}") if choice.fits else ("—", "—")
        values = (str(setup.gpus), words(choice), f"{choice.footprint.total / GIB:.1f}", "yes" if choice.fits else "no", *spent)
        rows.append(tuple(Entry(value, "" if choice.fits else "dim") for value in values))
    usable = f"Of {device.memory / GIB:.0f} GiB, {device.usable / GIB:.1f} are taken as usable."
    return Grid(title, tuple(Column(name, numeric=name not in ("setup", "fits")) for name in columns), tuple(rows), (usable,))


def parts_grid(choices: Sequence[Choice]) -> Grid:
    """What stands in the memory of one GPU, in GiB, for each of the choices; parts that none of them has are left out."""
    shown = [name for name in _PARTS if any(getattr(choice.footprint, name) for choice in choices)]
    columns = [Column("part", numeric=False), *(Column(f"G = {choice.setup.gpus}") for choice in choices)]
    rows = [
        (Entry(name.replace("_", " ")), *(Entry(f"{getattr(choice.footprint, name) / GIB:.2f}") for choice in choices))
        for name in shown
    ]
    total = (Entry("peak", "strong"), *(Entry(f"{choice.footprint.total / GIB:.2f}", "strong") for choice in choices))
    captions = (
        "An update in one micro-batch has gradients after activations. The whole policy of fsdp2, and keys and values, are of "
        "sampling and evaluation, which come between updates.",
    )
    return Grid("memory of one GPU of G, GiB", tuple(columns), (*rows, total), captions)


def times_grid(choices: Sequence[Choice]) -> Grid:
    """Where the hours go. Transfers overlap with training's products, so the longer of the two counts."""
    columns = ("part", *(f"G = {choice.setup.gpus}" for choice in choices))
    names = ("reference", "sampling", "training", "communication")
    rows = [
        (Entry(name), *(Entry(f"{getattr(choice.duration, name) / 3600:.3g}") for choice in choices))
        for name in names
        if any(getattr(choice.duration, name) for choice in choices)
    ]
    idle = (Entry("idle"), *(Entry(f"{choice.duration.idle:.0%}") for choice in choices))
    return Grid("hours on G GPUs", tuple(Column(name, numeric=name != "part") for name in columns), (*rows, idle), ())


def words(choice: Choice) -> str:
    """A setup by the flags of `train` that ask for it."""
    setup = choice.setup
    flags = [f"--strategy {setup.strategy}", f"--micro-batch-tokens {setup.micro_batch_tokens}"]
    flags += ["--activation-checkpointing"] if setup.checkpointing else []
    flags += [f"--lora {setup.lora}"] if setup.lora else []
    return " ".join(flags)


def model_line(shape: Shape, workload: Workload, lora: int) -> str:
    """What is trained, on what."""
    trained = f", {shape.trained(lora) / 1e6:.3g} million trained" if lora else ""
    return (
        f"{shape.name}: {shape.parameters / 1e9:.3g} billion parameters{trained}, {shape.layers} layers of {shape.hidden}. "
        f"{workload.algorithm} on {workload.rows:,} rows of {workload.tokens:,} tokens ({workload.prompt:,} of a prompt, "
        f"{workload.completions} completions of {workload.length - workload.prompt:,}), {workload.batch} an update."
    )


def assumed_line(utilisation: float) -> str:
    """What the hours rest on."""
    return (
        f"Assumed: {utilisation:.0%} of the GPU's bf16 products in training (--utilisation), transfers hidden behind them, "
        "rows as long as --max-length allows, layers like Llama's. Hours are estimates; what of the memory was counted, and "
        "what was not, is in docs/scaling.md."
    )


def answer(choice: Choice, device: Device, name: str, adapters: Choice | None, fewest: int | None) -> str:
    """Whether it fits, and what to do.

    Args:
        choice: the cheapest setup that fits, or the smallest.
        device, name: of the GPU.
        adapters: the same with adapters, where all weights do not fit.
        fewest: GPUs on which it would fit.
    """
    setup, need = choice.setup, choice.footprint.total / GIB
    many = f"{setup.gpus} {name}"
    if choice.fits:
        return f"Fits on {many}: {words(choice)}; {need:.1f} GiB of each GPU, {choice.duration.total / 3600:.3g} hours."
    advice = [f"{fewest} GPUs hold it"] if fewest is not None else []
    if adapters is not None and adapters.fits:
        advice.append(f"{words(adapters)} fits here ({adapters.footprint.total / GIB:.1f} GiB)")
    held = choice.footprint.whole + choice.footprint.reference
    if fewest is None and choice.footprint.whole:
        copies = "policy and reference whole" if choice.footprint.reference else "policy whole"
        advice.append(f"more GPUs do not help, for each holds the {copies} to sample and to evaluate ({held / GIB:.1f} GiB)")
    return (
        f"Does not fit on {many}: the smallest setup, {words(choice)}, needs {need:.1f} GiB of each GPU, and "
        f"{device.usable / GIB:.1f} are usable. {'; '.join(advice) or 'A shorter --max-length or a smaller model may'}."
    )
