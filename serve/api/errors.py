"""Every answer that is no success, in OpenAI's shape.

``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}``
"""

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...errors import MagnetarError, NotFiniteError, QueueFullError, StageLostError, UsageError

logger = logging.getLogger("magnetar.serve")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200. The message must not tell internals: it goes to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that is sent, also as an event in a stream."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def api_error_of(error: Exception) -> ApiError:
    """What a client is told about `error`; what is no fault of the client's is logged."""
    match error:
        case ApiError():
            return error
        case UsageError():
            return ApiError(400, str(error))
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", retry_after_s=2)
        case StageLostError():
            logger.warning("request failed: %s", error)
            return ApiError(
                503,
                f"The model is not available: {error}",
                code="stage_lost",
                retry_after_s=5,
            )
        case NotFiniteError():
            logger.warning("request failed: %s", error)
            return ApiError(500, str(error), code="not_finite")
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
        case MagnetarError():
            logger.error("request failed: %s", error)
            return ApiError(500, "The server failed; its log says why.", code="internal_error")
        case _:
            logger.error("request failed", exc_info=error)
            return ApiError(500, "The server failed; its log says why.", code="internal_error")


async def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything."""
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = ApiError(
            404,
            f"{request.method} {request.url.path} does not exist; see /v1/models,"
            " /v1/completions and /v1/chat/completions.",
            code="unknown_url",
        )
    elif isinstance(error, HTTPException) and error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        error = ApiError(
            405,
            f"{request.url.path} does not take {request.method}; use {allowed}.",
            code="method_not_allowed",
            headers=dict(error.headers or {}),
        )
    return api_error_of(error).response()
