"""Independent truth for the engine's tests: transformers' own `generate` and plain forward, small inputs, a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.rewards import LabelGrammar
from foveate.rollout.testing import tiny_model, tiny_processor
from foveate.rollout.types import Request, Rollout, RolloutGroup

# On tiny fp32 models transformers differs from its own cached decode by 2e-5, wrong positions by more than 2e-4.
TOLERANCE = 5e-5
KV_MEMORY = 1 << 22


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture
def make_engine(processor) -> Callable[..., Engine]:
    """make_engine(family or model, **EngineConfig fields): an engine on a tiny model, with little KV memory."""

    def make(model: str | nn.Module, **config: Any) -> Engine:
        model = tiny_model(model) if isinstance(model, str) else model
        config.setdefault("page_size", 8)
        return Engine(model, processor, EngineConfig(**{"kv_memory": KV_MEMORY, **config}))

    return make


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """picture(height, width, seed) -> uint8 [height, width, 3]"""

    def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return draw


@pytest.fixture
def chat() -> Callable[..., Request]:
    """chat(text, images, system=..., **SamplingParams fields and n): a request of chat messages."""

    def make(text: str, images=(), system: str | None = "Look well.", n: int = 1, **sampling: Any) -> Request:
        user = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return Request(messages, images=images, n=n, sampling=SamplingParams(**sampling))

    return make


def _inputs(model: nn.Module, group: RolloutGroup, completion: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a trainer hands to the module: ids, mask, and the images' inputs where there are images."""
    ids = torch.cat([group.prompt_ids, completion])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if group.pixel_values is not None:
        inputs |= {"pixel_values": group.pixel_values, "image_grid_thw": group.image_grid_thw}
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # a `generate` before leaves its own behind
    return inputs


def _logits(model: nn.Module, group: RolloutGroup, rollout: Rollout) -> torch.Tensor:
    inputs = _inputs(model, group, rollout.token_ids)
    with torch.no_grad():
        return model(**inputs).logits[0, len(group.prompt_ids) - 1 : -1].float()


def _generate(model: nn.Module, group: RolloutGroup, max_tokens: int, banned: Iterable[int]) -> torch.Tensor:
    inputs: dict[str, Any] = _inputs(model, group, group.prompt_ids[:0])
    sampling = group.request.sampling
    if sampling.ignore_eos:
        inputs["eos_token_id"] = model.get_output_embeddings().out_features  # an id that is never drawn
    out = model.generate(**inputs, suppress_tokens=sorted(banned) or None, max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(group.prompt_ids) :]


@pytest.fixture
def forward_logits() -> Callable[[nn.Module, RolloutGroup, Rollout], torch.Tensor]:
    """(model, group, rollout) -> float32 [T, vocab] of a plain transformers forward over prompt and completion."""
    return _logits


@pytest.fixture
def assert_logprobs() -> Callable[..., None]:
    """(model, groups): logprobs and entropy of every rollout are those of a plain transformers forward."""

    def check(model: nn.Module, groups: Iterable[RolloutGroup]) -> None:
        for group in groups:
            assert group.error is None
            temperature = group.request.sampling.temperature or 1.0
            for rollout in group.rollouts:
                expected = (_logits(model, group, rollout) / temperature).log_softmax(-1)
                chosen = expected.gather(1, rollout.token_ids[:, None])[:, 0]
                entropy = -(expected.exp() * expected).sum(-1)
                torch.testing.assert_close(rollout.logprobs, chosen, atol=TOLERANCE, rtol=0)
                torch.testing.assert_close(rollout.entropy, entropy, atol=TOLERANCE, rtol=0)

    return check


@pytest.fixture
def assert_greedy() -> Callable[..., None]:
    """(model, groups, banned): every rollout's tokens are those of transformers' greedy `generate`."""

    def check(model: nn.Module, groups: Iterable[RolloutGroup], banned: Iterable[int] = ()) -> None:
        for group in groups:
            assert group.error is None
            expected = _generate(model, group, group.request.sampling.max_tokens, banned)
            for rollout in group.rollouts:
                assert rollout.token_ids.tolist() == expected.tolist()

    return check


@pytest.fixture
def banned_by_default() -> Callable[[Engine], list[int]]:
    """(engine) -> the ids that `ban_vision_tokens` bans: vision pads and what lies beyond the tokenizer."""

    def ids(engine: Engine) -> list[int]:
        config, size = engine.model.config, len(engine._processor.tokenizer)
        names = ("image_token_id", "video_token_id", "vision_start_token_id")
        pads = {getattr(config, name) for name in names if hasattr(config, name)}
        return sorted(pads | set(range(size, engine.spec.vocab_size)))

    return ids


class ChatServer:
    """A real server of chat completions on a free port, with faults.

    respond(payload, number of the request) returns an object with any of: content (of the completion), body (raw
    bytes instead), status, headers, delay (seconds), drop ("before" | "headers" | "body": where the connection ends),
    hang (no answer), trickle (an answer that never ends). requests: what came. most_open: requests at one time.
    """

    def __init__(self, respond: Callable[[dict, int], Any]):
        self.respond, self.requests, self.most_open = respond, [], 0
        self._lock, self._open, self._stopping, self._port = threading.Lock(), 0, threading.Event(), 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                chat._serve(self)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self._stopping.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        payload = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            number = len(self.requests)
            headers = {name.lower(): value for name, value in handler.headers.items()}
            self.requests.append(SimpleNamespace(path=handler.path, headers=headers, payload=payload))
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        try:
            answer = self.respond(payload, number)
            self._stopping.wait(getattr(answer, "delay", 0) or (60 if hasattr(answer, "hang") else 0))
        finally:
            with self._lock:
                self._open -= 1
        self._write(handler, answer)

    def _write(self, handler: BaseHTTPRequestHandler, answer: Any) -> None:
        drop = getattr(answer, "drop", None)
        completion = {"choices": [{"message": {"role": "assistant", "content": getattr(answer, "content", "")}}]}
        body = getattr(answer, "body", json.dumps(completion).encode())
        handler.close_connection = True
        if drop == "before" or hasattr(answer, "hang"):
            return
        handler.send_response(getattr(answer, "status", 200))
        if drop == "headers":
            handler.flush_headers()
            return
        for name, value in getattr(answer, "headers", {}).items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(10**6 if hasattr(answer, "trickle") else len(body)))
        handler.end_headers()
        try:
            while hasattr(answer, "trickle") and not self._stopping.wait(0.05):
                handler.wfile.write(b" ")
            handler.wfile.write(body[: len(body) // 2] if drop == "body" else body)
        except OSError:
            pass  # the client went away


@pytest.fixture
def chat_server() -> Iterable[Callable[[Callable], ChatServer]]:
    """chat_server(respond): a started `ChatServer`."""
    servers: list[ChatServer] = []

    def make(respond: Callable[[dict, int], Any]) -> ChatServer:
        servers.append(ChatServer(respond))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def _honest(messages: list[dict[str, str]], **more: Any) -> SimpleNamespace:
    question = json.loads(messages[-1]["content"])
    values: dict[str, set[str]] = {}
    for subject, value in LabelGrammar().statements(question["text"]):
        values.setdefault(subject, set()).add(value)
    verdicts = []
    for fact in question["facts"]:
        found = values.get(fact["subject"])
        verdict = "absent" if not found else "stated" if found == {fact["value"]} else "contradicted"
        verdicts.append({"id": fact["id"], "verdict": verdict})
    return SimpleNamespace(content=json.dumps({"verdicts": verdicts}), **more)


@pytest.fixture
def honest() -> Callable[..., SimpleNamespace]:
    """(messages, ...) -> the right answer to a judge's question, by the grammar of labelled values."""
    return _honest
