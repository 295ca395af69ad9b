"""Any chat-completion endpoint (the interface that OpenAI, vLLM, llama.cpp, Ollama and others serve) as a chat model.

Replies are cached on disk by address, model, messages and parameters, so a rerun asks nothing twice. The key comes from the
environment and goes into one header: no message, cache or report holds it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor

from prefopt.chat.build import KEY_VARIABLE
from prefopt.chat.protocol import ChatError, Conversation, Usage
from prefopt.chat.replies import Reply, parse_reply, weigh
from prefopt.data.rows import safe
from prefopt.errors import ConfigError
from prefopt.files import parse_json

NO_LOGPROBS = "the endpoint gives no log-probabilities: answers are read from its words, so every label is 0 or 1"
# How many alternatives are asked for: the interface's most, what some servers allow, none. A server says what it refuses.
_TOPS = (20, 5, 0)
# Enough for "Response 2 is better."; the answer itself is one token or two.
_ANSWER_TOKENS = 16
_LONGEST_WAIT = 60.0
_AGAIN = (408, 409, 425, 429)  # and all from 500 on


class EndpointChat:
    """A chat-completion endpoint behind the `ChatModel` protocol. Conversations are asked side by side.

    Args:
        url: the base, such as https://host/v1; `/chat/completions` is added.
        model: as the endpoint calls it.
        cache: folder of replies; None keeps none.
        key_variable: environment variable with the key; None reads `PREFOPT_API_KEY` if it is set (local servers need none).
        parallel: conversations asked at once.
        timeout: seconds for a reply.
        retries: how often a busy or broken endpoint is asked again.
        backoff: seconds before the first retry; each further one waits twice as long, at most a minute, unless the endpoint
            says how long.

    Raises:
        ConfigError: an address that holds a key, or a key that is missing or would travel in clear text.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache: Path | None = None,
        key_variable: str | None = None,
        parallel: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
    ) -> None:
        try:
            address = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"{url!r} is no address ({error}): expected http(s)://host/v1.") from error
        if address.userinfo or address.query:
            raise ConfigError(
                f"the endpoint's address holds a user or a query; keys belong into an environment variable ({KEY_VARIABLE}, or "
                "the one that you name)."
            )
        if parallel < 1 or retries < 0 or timeout <= 0:
            raise ConfigError(
                "endpoint: parallel must be at least 1, retries not negative, timeout above 0; "
                f"got {parallel}, {retries}, {timeout}."
            )
        self._url = url.rstrip("/")
        self._model = model
        self.name = f"{model} at {address.host}"
        self.identity = f"{self._url}#{model}"
        self.parameters: int | None = None
        self.usage = Usage()
        self._variable = key_variable or KEY_VARIABLE
        self._key = _read_key(address, key_variable)
        self._cache, self._parallel, self._retries, self._backoff = cache, parallel, retries, backoff
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # No proxy stands between two programs of one machine.
        self._client = httpx2.Client(headers=headers, timeout=timeout, trust_env=not _is_local(address.host))
        self._lock = threading.Lock()
        self._dialect = _Dialect()
        self._silent = self._answered = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the endpoint does not do of what it was asked."""
        seed = () if self._dialect.seed else ("the endpoint takes no seed: a rerun without the cache may differ",)
        return ((NO_LOGPROBS,) if self._silent else ()) + seed

    def choose(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> Tensor:
        """As `ChatModel.choose`, from the alternatives that the endpoint lists (20 at most), else from what it says.

        Raises:
            ChatError: as `complete`.
        """
        asked = {"max_tokens": _ANSWER_TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": _TOPS[0]}
        replies = self._ask(conversations, asked)
        self._silent |= any(reply.tokens is None for reply in replies)
        return torch.stack([weigh(reply, answers) for reply in replies]) if replies else torch.empty(0, len(answers)).double()

    def complete(self, conversations: Sequence[Conversation], *, max_tokens: int, temperature: float, seed: int) -> list[str]:
        """As `ChatModel.complete`; endpoints keep to the seed as far as they do.

        Raises:
            ChatError: no connection, a refused key or request, or a reply that is none after all retries; the message names
                the conversation. Replies that came before it are in the cache.
        """
        asked = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return [reply.text.strip() for reply in self._ask(conversations, asked)]

    def _ask(self, conversations: Sequence[Conversation], parameters: dict[str, Any]) -> list[Reply]:
        bodies = [
            {"model": self._model, "messages": [dict(message) for message in conversation], **parameters}
            for conversation in conversations
        ]
        pool, stop = ThreadPoolExecutor(self._parallel), threading.Event()
        try:
            waiting = [pool.submit(self._one, index, body, stop) for index, body in enumerate(bodies)]
            return [future.result() for future in waiting]
        finally:
            # After an error or an interruption nothing more is asked; replies under way still reach the cache.
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, index: int, body: dict[str, Any], stop: threading.Event) -> Reply:
        """The reply to one conversation, from the cache or from the endpoint."""
        path = self._path(body)
        if path is not None and path.exists():
            try:
                reply = parse_reply(parse_json(path.read_text(encoding="utf-8"))["reply"])
            except (ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)  # damaged: asked for again
            else:
                with self._lock:
                    self.usage.cached += 1
                return reply
        found, reply = self._answer(index, body, stop)
        if path is not None:
            _store(path, {"endpoint": self._url, "request": body, "reply": found})
        with self._lock:
            self._answered = True
            self.usage.calls += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        return reply

    def _path(self, body: dict[str, Any]) -> Path | None:
        if self._cache is None:
            return None
        digest = hashlib.sha256(json.dumps([self._url, body], sort_keys=True).encode()).hexdigest()
        return self._cache / digest[:2] / f"{digest}.json"

    def _answer(self, index: int, body: dict[str, Any], stop: threading.Event) -> tuple[Any, Reply]:
        """The endpoint's JSON and the reply in it, after as many tries as it takes and are allowed."""
        tries = 0
        while True:
            dialect, wait = self._dialect, 0.0
            try:
                response = self._client.post(f"{self._url}/chat/completions", json=dialect.spoken(body))
                if response.status_code == 200:
                    found = parse_json(self._clean(response.text))
                    return found, parse_reply(found)
                if response.status_code in (400, 422) and self._learn(dialect, body, response.text):
                    continue  # asked again at once, without what was refused
                failure, wait = self._failure(response, index), _retry_after(response)
            except httpx2.RequestError as error:
                failure = f"{type(error).__name__}: {self._words(str(error)) or 'no reply'}"
                if isinstance(error, httpx2.ConnectError | httpx2.UnsupportedProtocol) and not self._answered:
                    message = f"{self._url}: cannot connect ({failure}). Is the server running, and the address right?"
                    raise ChatError(message) from None
            except ValueError as error:
                failure = f"a reply that is no chat completion ({self._words(str(error))})"
            if tries == self._retries:
                raise ChatError(
                    f"{self._url}: conversation {index}: {failure}, after {tries + 1} tries. Replies so far are in the cache: "
                    "the same command goes on. A busy endpoint is helped by asking less at once (--parallel)."
                )
            # Other threads were refused at the same moment: they do not come back at the same one.
            if stop.wait(wait or min(_LONGEST_WAIT, self._backoff * 2**tries) * random.uniform(0.5, 1.0)):
                raise ChatError(f"{self._url}: conversation {index}: {failure}; not asked again, since another one failed.")
            tries += 1

    def _failure(self, response: httpx2.Response, index: int) -> str:
        """Why the endpoint did not answer, if it is of use to ask again.

        Raises:
            ChatError: it is not.
        """
        status, said = response.status_code, self._words(response.text) or "no words"
        if status in _AGAIN or status >= 500:
            return f"status {status} ({said})"
        if status in (401, 403):
            key = "is not accepted" if self._key else "is not set"
            raise ChatError(
                f"{self._url}: status {status}: the endpoint wants a key, and that of the environment variable "
                f"{self._variable} {key}. Set it, or name another variable (--key-variable)."
            )
        hint = " Is the model's name right, and does the address end with /v1?" if status == 404 else ""
        raise ChatError(f"{self._url}: conversation {index}: status {status}: {said}.{hint}")

    def _learn(self, used: _Dialect, body: dict[str, Any], said: str) -> bool:
        """True when the endpoint's words name something of the request that it can be spared; noted for all requests."""
        other = used.without(said, body)
        with self._lock:
            # Conversations that are asked side by side are refused side by side: the first one's lesson is everyone's.
            if other != used and self._dialect == used:
                self._dialect = other
        return other != used

    def _clean(self, text: str) -> str:
        """A text of the endpoint without the key, which some echo."""
        return text.replace(self._key, "[key]") if self._key else text

    def _words(self, text: str) -> str:
        """A text of the endpoint for a message: on one line, and without what would steer a terminal."""
        return safe(" ".join(self._clean(text).split()), 300)


@dataclass(frozen=True)
class _Dialect:
    """What an endpoint takes of the interface: how many alternatives, a seed, and by which name a reply's limit."""

    top: int = _TOPS[0]
    seed: bool = True
    limit: str = "max_tokens"

    def spoken(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request as the endpoint takes it."""
        kept = {name: value for name, value in body.items() if name not in ("max_tokens", "seed", "logprobs", "top_logprobs")}
        kept[self.limit] = body["max_tokens"]
        if self.seed and "seed" in body:
            kept["seed"] = body["seed"]
        if self.top and "logprobs" in body:
            kept |= {"logprobs": True, "top_logprobs": self.top}
        return kept

    def without(self, said: str, body: dict[str, Any]) -> _Dialect:
        """The dialect without what a refusal of `body` names; itself when that is nothing it can do without."""
        if "logprobs" in said and "logprobs" in body and self.top:
            return replace(self, top=_TOPS[_TOPS.index(self.top) + 1])
        if "seed" in said and "seed" in body and self.seed:
            return replace(self, seed=False)
        if "max_completion_tokens" in said and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        return self


def _read_key(address: httpx2.URL, variable: str | None) -> str:
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if variable is not None and not key:
        raise ConfigError(f"the environment variable {variable}, which should hold the endpoint's key, is not set.")
    if key and variable is None and address.scheme == "http" and not _is_local(address.host):
        raise ConfigError(
            f"{address} is no https: the key of {KEY_VARIABLE} would travel in clear text. Use https, unset the variable, or "
            f"name it to send it all the same (--key-variable {KEY_VARIABLE})."
        )
    return key


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the endpoint asks to wait; 0 when it does not say, or says a date."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(response.headers.get("Retry-After", 0))))
    except ValueError:
        return 0.0


def _store(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One conversation may be asked by several threads or processes: each has a draft of its own.
    staged = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    staged.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(staged, path)
