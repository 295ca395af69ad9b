"""Losses by what users type: a registered name, or a weighted sum of them such as `dpo:1.0+sft:0.2`."""

from __future__ import annotations

import losses
from losses.declaration import RegistrationError
from losses.registry import Loss, UnknownName
from prefopt import algorithms
from prefopt.errors import ConfigError


def find_loss(name: str) -> Loss:
    """The loss registered under `name`, or the sum that it spells.

    Raises:
        ConfigError: an unknown term, with a suggestion; a term named twice; a bad number; or nothing but weights of 0.
    """
    try:
        loss = losses.get(name)
    except (UnknownName, RegistrationError) as error:
        raise ConfigError(str(error)) from error
    if all(term.scale == 0 for term in loss.terms):
        raise ConfigError(f"{name!r}: every term has weight 0, so there is nothing to minimise.")
    return loss


def find_algorithm(name: str) -> algorithms.Algorithm:
    """The algorithm of such a loss.

    Raises:
        ConfigError: as `find_loss`; terms that need different streams; or a loss that cannot be trained alone.
    """
    loss = find_loss(algorithms.split_online(name)[0])
    try:
        return algorithms.get(name)
    except ConfigError as error:
        streams = _streams(loss)
        if len(set(streams.values())) < 2:
            raise
        needs = ", ".join(f"{term} needs {stream!r}" for term, stream in streams.items())
        raise ConfigError(f"{name!r} cannot be trained: its terms need different streams: {needs}.") from error


def _streams(loss: Loss) -> dict[str, str]:
    """The stream of each term that has one by itself."""
    streams = {}
    for term in loss.terms:
        try:
            streams[term.name] = algorithms.stream_of(losses.get(term.name))
        except ConfigError:
            continue
    return streams
