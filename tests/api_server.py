"""The real HTTP server on loopback: over any engine, or a `FakeEngine` with real clients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from openai import DefaultHttpxClient, OpenAI

from magnetar.fetcher.config import ChatFormat, ModelConfig
from magnetar.serve.api.app import create_app
from magnetar.serve.api.served_model import EngineLike
from magnetar.serve.api.server import Server, bind
from magnetar.serve.text.sentencepiece_tokenizer import SentencePieceTokenizer
from magnetar.serve.text.tokenizer import Tokenizer
from magnetar.tests.fake_engine import FakeEngine
from magnetar.tests.tokenizers_for_tests import mistral_tokenizer_file

MODEL = "tiny/mixtral"
MISTRAL = SentencePieceTokenizer(mistral_tokenizer_file())
EOS = 2
CONFIG = ModelConfig(
    dim=16,
    n_layers=3,
    head_dim=8,
    hidden_dim=24,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=32000,
    rope_theta=1e4,
    max_context_tokens=256,
)
"""Of a model with the vocabulary of `MISTRAL`, and otherwise tiny."""


def saying(text: str, *, at_start: bool = False, then: Sequence[int] = (EOS,) * 99) -> FakeEngine:
    """An engine that answers `text` and then the tokens `then`.

    The text continues the prompt with a space, unless it stands `at_start`.
    """
    # Encoding puts a space before the text, which is the text's own here.
    assert at_start or text.startswith(" ")
    ids = MISTRAL.encode(text if at_start else text[1:], add_bos=False)
    return FakeEngine(reply=lambda prompt, params: [*ids, *then], eos_token_ids=frozenset({EOS}))


@dataclass(kw_only=True)
class Service:
    """A running server, and clients for it."""

    server: Server
    engine: FakeEngine
    http: httpx.Client
    openai: OpenAI

    def post(self, path: str, body: object) -> httpx.Response:
        """One request to an endpoint under /v1."""
        return self.http.post(f"/v1/{path}", json=body)


@contextmanager
def listening(
    engine: EngineLike,
    *,
    chat_format: ChatFormat = "none",
    tokenizer: Tokenizer = MISTRAL,
    max_context_tokens: int = 512,
    api_key: str | None = None,
) -> Iterator[Server]:
    """A server of `engine` until the block ends."""
    app = create_app(
        engine=engine,
        tokenizer=tokenizer,
        chat_format=chat_format,
        model_name=MODEL,
        max_context_tokens=max_context_tokens,
        created=1_702_000_000,
        api_key=api_key,
    )
    server = Server(app, bind("127.0.0.1", 0))
    server.start()
    try:
        yield server
    finally:
        server.stop(drain_s=5)


def http_client(server: Server, *, api_key: str | None = None) -> httpx.Client:
    """A plain client."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=server.url, timeout=60, headers=headers, trust_env=False)


def openai_client(server: Server, *, api_key: str | None = None) -> OpenAI:
    """OpenAI's own."""
    return OpenAI(
        base_url=f"{server.url}/v1",
        api_key=api_key or "none",
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=False),
    )


@contextmanager
def serving(
    engine: FakeEngine,
    *,
    chat_format: ChatFormat = "none",
    tokenizer: Tokenizer = MISTRAL,
    max_context_tokens: int = 512,
    api_key: str | None = None,
) -> Iterator[Service]:
    """Serve `engine` until the block ends; it must have let go of every request by then."""
    with (
        listening(
            engine,
            chat_format=chat_format,
            tokenizer=tokenizer,
            max_context_tokens=max_context_tokens,
            api_key=api_key,
        ) as server,
        http_client(server, api_key=api_key) as http,
        openai_client(server, api_key=api_key) as openai,
    ):
        yield Service(server=server, engine=engine, http=http, openai=openai)
    assert engine.num_running == 0


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])
