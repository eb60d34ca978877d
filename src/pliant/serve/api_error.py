"""Errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pliant.errors import PliantError

_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
CLIENT_CLOSED = 499  # nginx's status for a client that has gone


class ErrorDetail(BaseModel):
    """type: the kind of mistake. param: the field that is wrong. code: a name for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(PliantError):
    """A request that gets this HTTP status and, in OpenAI's shape, these words."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        detail = ErrorDetail(
            message=str(self).encode(errors="backslashreplace").decode(),  # quotes may be broken
            type=_TYPES.get(self.status, kind),
            param=self.param,
            code=self.code,
        )
        return ErrorBody(error=detail).model_dump()


def from_validation(errors: list[Any]) -> ApiError:
    """What pydantic found wrong, in one line; what was sent is not repeated.

    errors: of `ValidationError.errors()`; `loc` begins with where in the request the field was.
    """
    first = errors[0]
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "missing" and param is None:
        return ApiError("the body is empty; send a JSON object", code="invalid_json")
    words = [error["msg"] for error in errors if error["loc"][:2] == first["loc"][:2]]
    where = ".".join(str(part) for part in first["loc"][1:]) if len(words) == 1 else param
    return ApiError(f"{where or 'the body'}: {'; or '.join(dict.fromkeys(words))}", param=param)
