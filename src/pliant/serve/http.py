"""The OpenAI API, and a few pages beside it, over an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from pliant.budget import parse_size
from pliant.errors import BudgetError, PliantError
from pliant.serve.api_error import CLIENT_CLOSED, ApiError, ErrorBody, from_validation
from pliant.serve.engine import Answer, ClosedError, Engine, QueueFullError
from pliant.serve.gate import Gate, Limits
from pliant.serve.grammar import Grammars
from pliant.serve.metrics import Metrics
from pliant.serve.openai import ChatRequest, CompletionRequest, chat, completions
from pliant.serve.pressure import Watch
from pliant.serve.replies import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    Completion,
    TextChoice,
    Usage,
    chat_logprobs,
    collect,
    header,
    text_logprobs,
)
from pliant.serve.request import Event
from pliant.serve.request import Request as EngineRequest
from pliant.serve.streams import EventStream, chat_chunks, text_chunks

T = TypeVar("T")


class BudgetRequest(BaseModel):
    """memory: the total, in bytes or as text such as "1.5GiB"."""

    memory: Annotated[int, Field(lt=2**63)] | Annotated[str, Field(max_length=32)]


class BudgetStatus(BaseModel):
    """Bytes: memory is the budget, planned what everything takes at its peak."""

    memory: int | None
    planned: int
    weights: int
    cache: int
    waiting: int
    running: int


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "pliant"


class Models(BaseModel):
    object: str = "list"
    data: list[Model]


class Health(BaseModel):
    status: str = "ok"


@dataclass
class _Server:
    """What the routes share. encoder: the one thread that turns text into tokens, and grammars
    into what masks them."""

    engine: Engine
    name: str
    limits: Limits
    metrics: Metrics
    encoder: ThreadPoolExecutor
    grammars: Grammars
    started: int

    def check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            raise ApiError(
                f"the model {model!r} does not exist; this server serves {self.name!r}",
                404,
                param="model",
                code="model_not_found",
            )

    async def encode(self, translate: Callable[[Any, Engine, Grammars], T], body: Any) -> T:
        """`translate(body, engine, grammars)` where it does not hold up the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.encoder, translate, body, self.engine, self.grammars)

    def submit(self, requests: Sequence[EngineRequest]) -> list[Answer]:
        """Queue all of `requests`, or none."""
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.engine.submit(request))
        except PliantError:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    async def events(self, answer: Answer, began: float) -> AsyncIterator[Event]:
        """The events of an answer whose request came at `began`, until its time is over."""
        first, loop = True, asyncio.get_running_loop()
        deadline = loop.time() + began + self.limits.seconds - time.monotonic()
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await anext(answer)
            except StopAsyncIteration:
                return
            except TimeoutError:
                words = f"the answer took more than {self.limits.seconds:g} seconds"
                raise ApiError(words, 504, code="timeout") from None
            if first:
                self.metrics.began(time.monotonic() - began)
                first = False
            yield event

    async def whole(
        self,
        http: Request,
        answers: Sequence[Answer],
        reply: Callable[[], Coroutine[Any, Any, BaseModel]],
    ) -> Any:
        """The reply that `reply` makes of `answers`; they end when the client goes."""
        work = asyncio.create_task(reply())
        gone = asyncio.create_task(_gone(http))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else Response(status_code=CLIENT_CLOSED)
        finally:
            for answer in answers:
                answer.cancel()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


def create_app(
    engine: Engine,
    name: str,
    limits: Limits | None = None,
    origins: Sequence[str] = (),
    watch: Watch | None = None,
) -> FastAPI:
    """The server of `engine`, whose model goes by `name`; the engine closes when it ends.

    origins: web pages that browsers let call it (CORS); none by default. watch: entered as long as
    it serves.
    """
    limits, metrics = limits or Limits(), Metrics(engine.status)
    encoder = ThreadPoolExecutor(1, thread_name_prefix="pliant-encoder")
    grammars = Grammars(engine.tokenizer, engine.end)
    server = _Server(engine, name, limits, metrics, encoder, grammars, int(time.time()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with watch or nullcontext():
            yield
        await engine.close()
        encoder.shutdown()

    app = FastAPI(
        title="Pliant",
        version="v1",
        lifespan=lifespan,
        docs_url=None,  # its pages would load scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.add_middleware(Gate, limits=limits, metrics=metrics)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)
    _add_openai(app, server)
    _add_pages(app, server)
    return app


def _add_openai(app: FastAPI, server: _Server) -> None:
    @app.post("/v1/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, http: Request) -> Any:
        began = time.monotonic()
        server.check_model(body.model)
        made = await server.encode(completions, body)
        echoes = [echo for _, echo in made]
        answers = server.submit([request for request, _ in made])
        events = [server.events(answer, began) for answer in answers]
        told, each = body.logprobs is not None, body.n or 1
        if body.stream:
            chunks = text_chunks(events, echoes, server.name, told, body.wants_usage(), each)
            return EventStream(chunks, answers)

        async def reply() -> Completion:
            said = [await collect(one) for one in events]
            return Completion(
                **header("cmpl", server.name),
                choices=[
                    TextChoice(
                        index=index,
                        text=echo + one.text,
                        logprobs=text_logprobs(one.prompt, one.tokens, len(echo)) if told else None,
                        finish_reason=one.end.reason,
                    )
                    for index, (one, echo) in enumerate(zip(said, echoes, strict=True))
                ],
                usage=Usage.of([one.end for one in said], each),
            )

        return await server.whole(http, answers, reply)

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(body: ChatRequest, http: Request) -> Any:
        began = time.monotonic()
        server.check_model(body.model)
        requests = await server.encode(chat, body)
        answers = server.submit(requests)
        events = [server.events(answer, began) for answer in answers]
        told = bool(body.logprobs)
        if body.stream:
            chunks = chat_chunks(events, server.name, told, body.wants_usage())
            return EventStream(chunks, answers)

        async def reply() -> ChatCompletion:
            said = [await collect(one) for one in events]
            return ChatCompletion(
                **header("chatcmpl", server.name),
                choices=[
                    ChatChoice(
                        index=index,
                        message=ChatMessage(content=one.text),
                        logprobs=chat_logprobs(one.tokens) if told else None,
                        finish_reason=one.end.reason,
                    )
                    for index, one in enumerate(said)
                ],
                usage=Usage.of([one.end for one in said], len(said)),
            )

        return await server.whole(http, answers, reply)

    @app.get("/v1/models")
    async def list_models() -> Models:
        return Models(data=[Model(id=server.name, created=server.started)])

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Model:
        server.check_model(model)
        return Model(id=server.name, created=server.started)


def _add_pages(app: FastAPI, server: _Server) -> None:
    @app.get("/health")
    async def health() -> Health:
        return Health()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/budget")
    async def get_budget() -> BudgetStatus:
        return BudgetStatus(**_known(asdict(server.engine.status())))

    @app.put("/v1/budget")
    async def set_budget(body: BudgetRequest) -> BudgetStatus:
        try:
            status = await server.engine.set_budget(parse_size(body.memory))
        except BudgetError as error:
            raise ApiError(str(error), param="memory", code="invalid_budget") from None
        return BudgetStatus(**_known(asdict(status)))


def _known(status: dict[str, Any]) -> dict[str, Any]:
    return {name: status[name] for name in BudgetStatus.model_fields}


async def _gone(http: Request) -> None:
    """Return when the client is no longer there."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _on_error(http: Request, error: Exception) -> Response:
    """Every failure in OpenAI's shape."""
    match error:
        case ApiError():
            found = error
        case RequestValidationError():
            found = from_validation(list(error.errors()))
        case HTTPException():
            found = ApiError(str(error.detail), error.status_code)
        case QueueFullError() | ClosedError():
            found = ApiError(str(error), 503)
        case PliantError():
            found = ApiError(str(error), 500)
        case _:
            found = ApiError("the server failed; its log says how", 500)
    headers = dict(getattr(error, "headers", None) or {})
    return JSONResponse(found.body(), found.status, headers)


_HANDLERS: dict[Any, Any] = dict.fromkeys(
    (PliantError, RequestValidationError, HTTPException, Exception), _on_error
)
