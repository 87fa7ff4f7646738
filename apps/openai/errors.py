"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from isthmus.protocol.errors import ConversationFullError, DeviceError, EngineError, IsthmusError

RETRY_S = 1  # that a client is told to wait where too much is asked at once


class ApiError(Exception):
    """What a client is told in place of an answer.

    Attributes:
        status: of HTTP.
        problem: what is wrong and what to do.
        kind: of errors, as OpenAI names them.
        parameter: of the request, that is at fault; empty for none.
        code: OpenAI's name of the very error; empty for none.
    """

    def __init__(self, status: int, problem: str, kind: str, parameter: str = "", code: str = "") -> None:
        super().__init__(problem)
        self.status, self.problem, self.kind, self.parameter, self.code = status, problem, kind, parameter, code

    def body(self) -> dict[str, Any]:
        """As JSON types."""
        named = {"param": self.parameter or None, "code": self.code or None}
        return {"error": {"message": self.problem, "type": self.kind, **named}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_S)} if self.status in (429, 503) else {}


def invalid(problem: str, parameter: str = "", code: str = "") -> ApiError:
    """The request is at fault."""
    return ApiError(400, problem, "invalid_request_error", parameter, code)


def unsupported(parameter: str, remedy: str = "leave it out") -> ApiError:
    """It asks for what nobody here does."""
    return invalid(f"{parameter} is not supported here: {remedy}", parameter, "unsupported_parameter")


def refused() -> ApiError:
    """Nobody knows the token."""
    problem = "no such token: send `Authorization: Bearer TOKEN`, with one that `isthmus keys token NAME` made"
    return ApiError(401, problem, "invalid_request_error", code="invalid_api_key")


def busy(problem: str) -> ApiError:
    """Too much is asked at once."""
    return ApiError(429, f"{problem}: try again in a moment", "rate_limit_error", code="rate_limit_exceeded")


def of(error: IsthmusError) -> ApiError:
    """What one of ours is to a client: the request's fault, or the cloud's."""
    problem = ": ".join(part for part in (error.problem, error.remedy) if part)
    if isinstance(error, DeviceError | EngineError):
        return invalid(problem, code="context_length_exceeded" if isinstance(error, ConversationFullError) else "")
    return ApiError(503, problem, "server_error", code="service_unavailable")
