"""The HTTP API of one model: OpenAI's and Mistral's endpoints over one engine."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import MagnetarError
from ...fetcher.config import ChatFormat
from ..text.grammar import GrammarCompiler
from ..text.tokenizer import Tokenizer
from .chat_completions import answer_chat
from .completions import answer_completion
from .disconnect import ClientLeft
from .embeddings import answer_embeddings
from .errors import ApiError, answer_error
from .guards import KeyGuard, LoopbackGuard
from .metrics import CONTENT_TYPE
from .readiness import NotReady, Readiness
from .served_model import EngineLike, ServedModel
from .tokenization import answer_detokenize, answer_tokenize, answer_tokenizer_info


def create_app(
    *,
    engine: EngineLike,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    model_name: str,
    max_context_tokens: int,
    created: int,
    api_key: str | None,
) -> Starlette:
    """The application that `Server` runs. It must run in one event loop, the engine's users' own.

    `created` is a Unix time in seconds. With an `api_key` every path but the probes wants it;
    without one, which `server.bind` allows on loopback only, web pages are kept out by their Host
    and Origin.
    """
    guard = Middleware(LoopbackGuard) if api_key is None else Middleware(KeyGuard, api_key=api_key)
    app = Starlette(
        routes=[
            Route("/livez", _answer_livez),
            Route("/readyz", _answer_readyz),
            Route("/health", _answer_readyz),
            Route("/metrics", _answer_metrics),
            Route("/v1/models", _answer_models),
            Route("/v1/models/{name:path}", _answer_model),
            Route("/v1/completions", answer_completion, methods=["POST"]),
            Route("/v1/chat/completions", answer_chat, methods=["POST"]),
            Route("/v1/embeddings", answer_embeddings, methods=["POST"]),
            Route("/tokenize", answer_tokenize, methods=["POST"]),
            Route("/detokenize", answer_detokenize, methods=["POST"]),
            Route("/tokenizer_info", answer_tokenizer_info),
        ],
        middleware=[guard],
        exception_handlers={
            ApiError: answer_error,
            MagnetarError: answer_error,
            HTTPException: answer_error,
            ClientLeft: _answer_nobody,
            Exception: answer_error,
        },
    )
    app.state.model = ServedModel(
        engine=engine,
        tokenizer=tokenizer,
        grammars=GrammarCompiler(tokenizer),
        chat_format=chat_format,
        name=model_name,
        max_context_tokens=max_context_tokens,
        created=created,
    )
    app.state.readiness = Readiness(engine)
    return app


async def _answer_livez(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _answer_readyz(request: Request) -> Response:
    readiness: Readiness = request.app.state.readiness
    try:
        probe_s = await readiness.check()
    except NotReady as error:
        raise ApiError(503, f"Not ready: {error}.", code="not_ready", retry_after_s=5) from None
    return JSONResponse({"status": "ok", "probe_s": round(probe_s, 6)})


async def _answer_metrics(request: Request) -> Response:
    model: ServedModel = request.app.state.model
    page = model.metrics.render(model.engine.stats(), model_name=model.name)
    return Response(page, media_type=CONTENT_TYPE)


async def _answer_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(request.app.state.model)]})


async def _answer_model(request: Request) -> Response:
    model: ServedModel = request.app.state.model
    model.check_name(request.path_params["name"])
    return JSONResponse(_card(model))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's word for it; nobody reads it


def _card(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "magnetar",
        "root": model.name,
        "parent": None,
        "permission": [],
        "max_model_len": model.max_context_tokens,
        # Mistral's client refuses a list of models without these.
        "type": "base",
        "capabilities": {
            "completion_chat": model.chat_format != "none",
            "completion_fim": False,
            "function_calling": False,
            "fine_tuning": False,
            "vision": False,
        },
        "max_context_length": model.max_context_tokens,
        "aliases": [],
    }
