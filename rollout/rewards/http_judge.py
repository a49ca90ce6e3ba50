"""A judge behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

from foveate.rollout.checks import require
from foveate.rollout.rewards.background import BackgroundLoop
from foveate.rollout.rewards.chat_client import ChatClient, Limits
from foveate.rollout.rewards.judge_prompt import RESPONSE_FORMAT, Question
from foveate.rollout.rewards.model_judge import ModelJudge
from foveate.rollout.rewards.text import think_part


class HTTPJudge(ModelJudge):
    """Asks a served language model, greedily and with a JSON schema, which of the facts a reply states.

    base_url: for example "http://localhost:8000/v1". api_key: sent as a bearer token; api_key_variable: the name of
    an environment variable that holds it instead. concurrency: open requests at a time, whichever threads they come
    from. attempt_seconds: of one attempt; total_seconds: of a judgement with its retries, from when it is its turn.
    max_attempts: connection errors, timeouts, 429 and 5xx are tried again with backoff, as late as the server's
    Retry-After asks. options: more fields of the request, None takes one away; for example {"max_tokens": None,
    "max_completion_tokens": 512}. proxy: its URL. part: see `ModelJudge`.
    A judgement that fails is None: the server's status, its silence and what it writes never raise. Once two
    judgements in a row got no answer at all, others fail at once for attempt_seconds, so that a server that hangs
    does not cost its time for every reply. No environment variable or process-global state is touched. Safe to share
    between threads. Raises ImportError without httpx and tenacity, ValueError for a wrong argument.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        api_key_variable: str | None = None,
        concurrency: int = 64,
        attempt_seconds: float = 60.0,
        total_seconds: float = 180.0,
        max_attempts: int = 4,
        options: Mapping[str, Any] | None = None,
        proxy: str | None = None,
        part: Callable[[str], str | None] = think_part,
    ) -> None:
        super().__init__(part)
        missing = [name for name in ("httpx", "tenacity") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"expected {' and '.join(missing)} to be installed: pip install 'foveate[judge]'")
        require(base_url.startswith(("http://", "https://")), "an http or https URL", base_url, "base_url")
        require(concurrency >= 1, "an int >= 1", concurrency, "concurrency")
        require(max_attempts >= 1, "an int >= 1", max_attempts, "max_attempts")
        require(attempt_seconds > 0, "seconds > 0", attempt_seconds, "attempt_seconds")
        require(total_seconds >= attempt_seconds, f"seconds >= {attempt_seconds}", total_seconds, "total_seconds")
        key = _key(api_key, api_key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._url, self._proxy = f"{base_url.rstrip('/')}/chat/completions", proxy
        self._limits = Limits(concurrency, attempt_seconds, total_seconds, max_attempts)
        self._model, self._options = model, dict(options or {})
        self._loop = BackgroundLoop()
        self._clients: dict[asyncio.AbstractEventLoop, ChatClient] = {}  # connections belong to a loop

    def close(self) -> None:
        """Closes the connections and ends the thread; the next judgement opens new ones.

        Judgements that other threads wait for are None.
        """
        self._loop.close(self._close_client)

    def _answers(self, questions: Sequence[Question]) -> Sequence[str | Exception]:
        try:
            return self._loop.run(self._ask_all([self._payload(question) for question in questions]))
        except CancelledError:
            return [ConnectionAbortedError("expected an answer, got close()")] * len(questions)

    async def _ask_all(self, payloads: Sequence[Mapping[str, Any]]) -> list[str | Exception]:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = ChatClient(self._url, self._headers, self._limits, self._proxy)
        complete = self._clients[loop].complete
        return list(await asyncio.gather(*(complete(payload) for payload in payloads)))

    async def _close_client(self) -> None:
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _payload(self, question: Question) -> dict[str, Any]:
        fields = {
            "model": self._model,
            "messages": question.messages,
            "temperature": 0,
            "max_tokens": question.max_tokens,
            "response_format": dict(RESPONSE_FORMAT),
            **self._options,
        }
        return {name: value for name, value in fields.items() if value is not None}


def _key(key: str | None, variable: str | None) -> str | None:
    require(key is None or variable is None, "api_key or api_key_variable, not both", variable, "api_key_variable")
    if variable is None:
        return key
    require(variable in os.environ, "the name of an environment variable that is set", variable, "api_key_variable")
    return os.environ[variable]
