"""Chat completions of an OpenAI-compatible server: bounded concurrency, time limits, retries."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

MAX_BODY_BYTES = 1 << 20
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 8.0
# So many requests in a row without any answer, and those that queue are not made to wait as long again.
SILENT_REQUESTS = 2


class ServerError(Exception):
    """The server gave no completion; `retry_after`: seconds it asks to wait."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class TransientError(ServerError):
    """Another attempt may succeed: connection errors, timeouts, 429, 5xx."""


@dataclass(frozen=True)
class Limits:
    """concurrency: open requests. attempt_seconds: one attempt; total_seconds: all attempts and waits of a request."""

    concurrency: int
    attempt_seconds: float
    total_seconds: float
    max_attempts: int


class ChatClient:
    """Belongs to one event loop. url: of the chat completions. proxy: of all requests, None for a direct connection."""

    def __init__(self, url: str, headers: Mapping[str, str], limits: Limits, proxy: str | None):
        import httpx

        self.url, self.limits = url, limits
        pool = httpx.Limits(max_connections=limits.concurrency)
        # trust_env would take proxies and credentials from the environment.
        self._http = httpx.AsyncClient(headers=headers, timeout=None, limits=pool, proxy=proxy, trust_env=False)
        self._transport_error = httpx.TransportError
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._random = random.Random()  # the global generator is the caller's
        self._last_answer = -math.inf  # seconds of the loop's clock
        self._silent, self._silent_until = 0, -math.inf

    async def complete(self, payload: Mapping[str, Any]) -> str | Exception:
        """The completion's text, or why there is none."""
        clock = asyncio.get_running_loop().time
        async with self._slots:
            if clock() < self._silent_until:
                return ServerError(f"expected an answer of {self.url}, got none lately")
            begun = clock()
            try:
                async with asyncio.timeout(self.limits.total_seconds):
                    return await self._retrying(payload)
            except Exception as error:
                if self._last_answer < begun:
                    self._silent += 1
                    if self._silent >= SILENT_REQUESTS:
                        self._silent_until = clock() + self.limits.attempt_seconds
                return error

    async def close(self) -> None:
        await self._http.aclose()

    async def _retrying(self, payload: Mapping[str, Any]) -> str:
        import tenacity

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_after_attempt(self.limits.max_attempts)
            | tenacity.stop_before_delay(self.limits.total_seconds),
            wait=self._wait,
            reraise=True,
        )
        return await retrying(self._attempt, payload)

    def _wait(self, state: Any) -> float:
        """Exponential backoff between half and all of its length, at least what the server asks for."""
        longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (state.attempt_number - 1))
        return max(state.outcome.exception().retry_after, longest * self._random.uniform(0.5, 1.0))

    async def _attempt(self, payload: Mapping[str, Any]) -> str:
        try:
            async with (
                asyncio.timeout(self.limits.attempt_seconds),
                self._http.stream("POST", self.url, json=payload) as response,
            ):
                body = b""
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise ServerError(f"expected at most {MAX_BODY_BYTES} bytes, got more")
        except (TimeoutError, self._transport_error) as error:
            raise TransientError(f"expected an answer of {self.url}, got {error!r}") from error
        self._last_answer, self._silent = asyncio.get_running_loop().time(), 0
        if response.status_code != 200:
            message = f"expected status 200 of {self.url}, got {response.status_code}: {body[:200]!r}"
            if response.status_code == 429 or response.status_code >= 500:
                raise TransientError(message, _seconds(response.headers.get("retry-after", "")))
            raise ServerError(message)
        return _content(body)


def _content(body: bytes) -> str:
    """The text of the one choice of a chat completion."""
    try:
        (choice,) = json.loads(body.decode())["choices"]
        content = choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ServerError(f"expected a chat completion with one choice, got {body[:200]!r}") from error
    if not isinstance(content, str):
        raise ServerError(f"expected a completion of text, got {body[:200]!r}")
    return content


def _seconds(retry_after: str) -> float:
    """A Retry-After header, which is a number of seconds or a date; 0 for anything else."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
