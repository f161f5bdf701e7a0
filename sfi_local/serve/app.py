"""The routes of the server."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from sfi_local.binding.library import source_id
from sfi_local.runtime.template import Message
from sfi_local.serve.asking import Answering, Answers, Asked, asked_of_chat, asked_of_completion
from sfi_local.serve.chat import Shape, TextShape
from sfi_local.serve.guard import Guard
from sfi_local.serve.http import Events, JsonResponse, refusal, told, unless_gone
from sfi_local.serve.json_body import parse_object, read_body
from sfi_local.serve.messages import MessageShape, MessagesRequest
from sfi_local.serve.metrics import Metrics
from sfi_local.serve.page import CSP, page
from sfi_local.serve.problems import Problem
from sfi_local.serve.requests import ChatRequest, CompletionRequest, messages_of, parsed
from sfi_local.serve.responses import ResponseShape, ResponsesRequest
from sfi_local.serve.worker import Worker

MAX_TOKENS = 1 << 20  # of /detokenize


@dataclass
class Settings:
    """What the routes need to know. name: by which requests call the model; key: None: none; grace: seconds that answers have at the end"""

    name: str
    key: str | None = None
    grace: float = 10.0


class Server:
    """A model that is loaded in the background, and the ASGI application that answers with it.

    load:   () -> Worker that is not started; memory: () -> bytes of this process
    status: loading, ready, busy (every slot computes), failed, ending
    """

    def __init__(self, settings: Settings, load: Callable[[Metrics], Worker], memory: Callable[[], float] = lambda: 0.0):
        self.settings, self.metrics, self._load, self._memory = settings, Metrics(), load, memory
        self.worker: Worker | None = None
        self.failure: BaseException | None = None
        self.ending = False
        self.loaded = threading.Event()  # or failed
        self._answers, self._began = Answers(), int(time.time())
        self.app = Guard(Starlette(routes=self._routes(), exception_handlers={404: _no_route, 405: _no_route}), settings.key, self._counted)

    def start(self) -> None:
        """Begin to load."""
        threading.Thread(target=self._load_now, name="sfi-load", daemon=True).start()

    def stop(self) -> None:
        """Let answers end within the grace, end the others, free the model."""
        self.ending = True
        self.loaded.wait(60)
        if self.worker:
            self.worker.stop(self.settings.grace)
            self.worker.model.close()

    @property
    def status(self) -> str:
        if self.ending:
            return "ending"
        if self.failure is not None:
            return "failed"
        if self.worker is None:
            return "loading"
        return "busy" if all(slot["state"] != "idle" for slot in self.worker.describe()) else "ready"

    def _load_now(self) -> None:
        try:
            worker = self._load(self.metrics)
            worker.start()
            self.metrics.watch(worker, self._memory)
            self.worker = worker
        except BaseException as error:  # told by /health, and by who started it
            self.failure = error
        finally:
            self.loaded.set()

    def _counted(self, route: str, status: int) -> None:
        self.metrics.requests.labels(route, str(status)).inc()

    def _ready(self) -> Worker:
        if self.ending:
            raise Problem("The server is shutting down.", 503, "shutting_down", kind="server_error")
        if self.failure is not None:
            raise Problem("The model could not be loaded; the server's log says why.", 503, "failed", kind="server_error")
        if self.worker is None:
            raise Problem("The model is being loaded: try again soon.", 503, "loading", kind="server_error")
        return self.worker

    # ---- routes ----

    def _routes(self) -> list[Route]:
        def get(path: str, do: Any) -> Route:
            return Route(path, self._endpoint(path, do), methods=["GET"])

        def post(path: str, do: Any) -> Route:
            async def with_body(request: HttpRequest) -> Response:
                body = await read_body(request.receive, request.headers.get("content-length"))
                value = await asyncio.to_thread(parse_object, body)
                return await do(request, value)
            return Route(path, self._endpoint(path, with_body), methods=["POST"])

        return [get("/", self._page), get("/health", self._health), get("/metrics", self._metrics), get("/slots", self._slots),
                get("/v1/models", self._models), get("/v1/models/{name:path}", self._model),
                post("/v1/chat/completions", self._chat), post("/v1/completions", self._completion),
                post("/v1/responses", self._responses), post("/v1/messages", self._message),
                post("/v1/messages/count_tokens", self._count_tokens), post("/v1/embeddings", self._embeddings),
                post("/tokenize", self._tokenize), post("/detokenize", self._detokenize)]

    @staticmethod
    def _endpoint(path: str, do: Any) -> Any:
        async def endpoint(request: HttpRequest) -> Response:
            request.scope["sfi.route"] = path
            try:
                return await do(request)
            except Exception as error:
                return refusal(error, path)
        return endpoint

    async def _page(self, request: HttpRequest) -> Response:
        return HTMLResponse(page(), headers={"content-security-policy": CSP, "cache-control": "no-cache"})

    async def _health(self, request: HttpRequest) -> Response:
        status = self.status
        return JsonResponse({"status": status}, 200 if status in ("ready", "busy") else 503)

    async def _metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _slots(self, request: HttpRequest) -> Response:
        worker = self._ready()
        return JsonResponse({"slots": worker.describe(), "waiting": worker.n_waiting})

    async def _models(self, request: HttpRequest) -> Response:
        return JsonResponse({"object": "list", "data": [self._about()]})

    async def _model(self, request: HttpRequest) -> Response:
        self._check_name(request.path_params["name"])
        return JsonResponse(self._about())

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"id": self.settings.name, "object": "model", "created": self._began, "owned_by": "sfi-local"}
        if self.worker:
            model = self.worker.model
            about["sfi"] = {"n_ctx": model.n_ctx_limit, "mode": model.mode, "quality": model.quality, "slots": len(self.worker.slots),
                            "name": model.name, "chat": model.file.metadata.get("tokenizer.chat_template") is not None}
        return about

    def _check_name(self, name: str) -> None:
        if name != self.settings.name:
            raise Problem(f"The model {name[:200]!r} does not exist here: this server has {self.settings.name!r}.", 404, "model_not_found", "model")

    async def _chat(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        worker, request = self._ready(), parsed(ChatRequest, value)
        self._check_name(request.model)
        asked = await asyncio.to_thread(asked_of_chat, worker.model, request, self._answers)
        shape = Shape(worker.model.vocabulary, self.settings.name, source_id())
        return await self._answer(http, request, asked, shape, self._remembering(request))

    def _remembering(self, request: ChatRequest) -> Any:
        """Called with an answer that is whole, and its text: the next request of this conversation goes on from its tokens."""
        messages: list[Message] = messages_of(request)

        def ended(answer: Answering, text: str) -> None:
            tokens = answer.tokens if answer.finish == "length" else answer.tokens[:-1]
            if answer.finish != "tool_calls":
                self._answers.remember(messages, text, tokens)
        return ended

    async def _responses(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        wanted = parsed(ResponsesRequest, value)
        return await self._translated(http, wanted, ResponseShape(wanted, value, self.settings.name))

    async def _message(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        return await self._translated(http, parsed(MessagesRequest, value), MessageShape(self.settings.name))

    async def _translated(self, http: HttpRequest, wanted: Any, shape: Any) -> Response:
        """One answer to a request that means the same as a chat request."""
        request, asked = await self._as_chat(wanted)
        answer, ended = Answering(self._ready(), asked), self._remembering(request)
        if wanted.stream:
            return Events(shape.stream(answer, ended), answer.cancel)
        return JsonResponse(await unless_gone(http.receive, shape.whole(answer, ended), answer.cancel))

    async def _as_chat(self, wanted: Any) -> tuple[ChatRequest, Asked]:
        worker = self._ready()
        self._check_name(wanted.model)
        request = parsed(ChatRequest, wanted.as_chat())
        return request, (await asyncio.to_thread(asked_of_chat, worker.model, request, self._answers))[0]

    async def _count_tokens(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        _, asked = await self._as_chat(parsed(MessagesRequest, {"max_tokens": 1, **value}))
        return JsonResponse({"input_tokens": len(asked.tokens)})

    async def _completion(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        worker, request = self._ready(), parsed(CompletionRequest, value)
        self._check_name(request.model)
        asked = await asyncio.to_thread(asked_of_completion, worker.model, request)

        def echo(answer: Answering) -> str:
            return worker.model.detokenize(answer.asked.tokens) if request.echo else ""
        shape = TextShape(worker.model.vocabulary, self.settings.name, source_id(), echo)
        return await self._answer(http, request, asked, shape, lambda answer, text: None)

    async def _answer(self, http: HttpRequest, request: Any, asked: list[Asked], shape: Shape, ended: Any) -> Response:
        worker = self._ready()
        answers = [Answering(worker, one) for one in asked]

        def gone() -> None:
            for answer in answers:
                answer.cancel()
        if request.stream:
            with_usage = bool(request.stream_options and request.stream_options.include_usage)
            return Events(told(shape.stream(answers, ended, with_usage)), gone)
        return JsonResponse(await unless_gone(http.receive, shape.whole(answers, ended), gone))

    async def _embeddings(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        raise Problem("This server generates text; its model makes no embeddings. Use a server with an embedding model for them.", 400,
                      "embeddings_not_supported")

    async def _tokenize(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        text = value.get("content", value.get("prompt", value.get("text")))
        if not isinstance(text, str):
            raise Problem("content is missing: give the text to tokenize.", param="content")
        model = self._ready().model
        tokens = await asyncio.to_thread(model.tokenize, text, bool(value.get("add_special")) and model.vocabulary.add_bos,
                                         bool(value.get("parse_special")))
        return JsonResponse({"tokens": tokens, "count": len(tokens)})

    async def _detokenize(self, http: HttpRequest, value: dict[str, Any]) -> Response:
        model, tokens = self._ready().model, value.get("tokens")
        n_vocab = model.vocabulary.n_vocab
        if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS or not all(type(t) is int and 0 <= t < n_vocab for t in tokens):
            raise Problem(f"tokens must be a list of at most {MAX_TOKENS} token ids, 0 to {n_vocab - 1}.", param="tokens")
        return JsonResponse({"content": await asyncio.to_thread(model.detokenize, tokens)})


async def _no_route(request: HttpRequest, error: Any) -> Response:
    """For a path, or a method of one, that there is not."""
    return refusal(Problem(f"There is no {request.method} {request.url.path[:200]} here.", error.status_code, "not_found"))
