"""The page over HTTP, for this machine alone: one process, one request at a time, nothing from elsewhere."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib import resources
from typing import Any

from tessella.errors import ConfigError
from tessella.explorer.session import Refused, Session
from tessella.extras import require

MAX_BYTES = 16 << 20  # of a request: a picture or a sound
_PAGES = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"),
          "/style.css": ("style.css", "text/css")}  # fmt: skip
_POLICY = "default-src 'self'; img-src 'self' data: blob:; media-src data: blob:; style-src 'self' 'unsafe-inline'"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def application(session: Session, *, to_others: bool = False) -> Any:
    """The Starlette application of a session.

    It answers to names of the loopback address alone: a page elsewhere that has its own name point here is refused, as
    are its requests.

    Args:
        session: what is explored.
        to_others: answer to this machine's name and to addresses too, which no page elsewhere can have for a name.
    """
    require("starlette", extra="ui")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def answered(action: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            place = request.headers.get("host", "")
            origin = request.headers.get("origin", f"http://{place}")
            name = re.sub(r":\d+$", "", place)
            known = name in _LOOPBACK or (to_others and (name == socket.gethostname() or _is_address(name)))
            if not known or origin != f"http://{place}":
                return JSONResponse({"refused": f"this page is not called {name!r}"}, 403)
            try:
                return await action(request)
            except Refused as refusal:
                return JSONResponse({"refused": str(refusal)}, 422)

        return respond

    async def page(request: Request) -> Response:
        file, kind = _PAGES[request.url.path]
        content = (resources.files("tessella") / "explorer" / "static" / file).read_bytes()
        return Response(
            content, media_type=kind, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
        )

    async def about(request: Request) -> Response:
        return JSONResponse(session.about())

    async def thumbnail(request: Request) -> Response:
        return Response(
            await run_in_threadpool(session.thumbnail, request.path_params["number"]), media_type="image/png"
        )

    async def example(request: Request) -> Response:
        x = session.example(request.path_params["number"])
        return JSONResponse(await run_in_threadpool(session.view, x))

    async def dropped(request: Request) -> Response:
        content = await _body(request)
        name = request.query_params.get("name", "the file")
        return JSONResponse(await run_in_threadpool(session.open, content, name))

    async def decode(request: Request) -> Response:
        asked = await _json(request)
        answer = await run_in_threadpool(session.decode, *_fields(asked, "tokens", "grid", "extent"))
        return JSONResponse(answer)

    async def code(request: Request) -> Response:
        places = request.path_params
        return JSONResponse(await run_in_threadpool(session.code, places["codebook"], places["number"]))

    async def codes(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.map, request.path_params["codebook"]))

    async def sample(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.sample, await _json(request)))

    async def fill(request: Request) -> Response:
        asked = await _json(request)
        tokens, grid, region = _fields(asked, "tokens", "grid", "region")
        return JSONResponse(await run_in_threadpool(session.fill, tokens, grid, region, asked))

    async def _body(request: Request) -> bytes:
        said = request.headers.get("content-length", "0")
        received = bytearray()
        async for piece in request.stream():
            received += piece
            if len(received) > MAX_BYTES or (said.isdecimal() and int(said) > MAX_BYTES):
                raise Refused(f"files of at most {MAX_BYTES >> 20} MiB are taken")
        return bytes(received)

    async def _json(request: Request) -> dict[str, Any]:
        try:
            asked = json.loads(await _body(request))
        except (ValueError, RecursionError) as error:
            raise Refused("the request is no JSON") from error
        if not isinstance(asked, dict):
            raise Refused("the request must be a JSON object")
        return asked

    routes: list[tuple[str, Any, str]] = [
        *((path, page, "GET") for path in _PAGES),
        ("/api/about", about, "GET"),
        ("/api/examples/{number:int}.png", thumbnail, "GET"),
        ("/api/examples/{number:int}", example, "GET"),
        ("/api/open", dropped, "POST"),
        ("/api/decode", decode, "POST"),
        ("/api/codes/{codebook:int}", codes, "GET"),
        ("/api/codes/{codebook:int}/{number:int}", code, "GET"),
        ("/api/sample", sample, "POST"),
        ("/api/fill", fill, "POST"),
    ]
    return Starlette(routes=[Route(path, answered(action), methods=[method]) for path, action, method in routes])


def _fields(asked: dict[str, Any], *names: str) -> list[list[int]]:
    """Lists of whole numbers out of a request."""
    found = []
    for name in names:
        value = asked.get(name)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise Refused(f"'{name}' must be a list of whole numbers")
        found.append(value)
    return found


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def serve(session: Session, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; ``ready`` is told the address.

    Raises:
        ConfigError: the port is taken, or no such address is this machine's.
    """
    require("uvicorn", extra="ui")
    import uvicorn

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # before anybody is told: who comes early waits
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}; --port 0 takes a free one"
        ) from error
    name = f"[{host}]" if ":" in host else host
    page = application(session, to_others=name not in _LOOPBACK)
    with listener, suppress(KeyboardInterrupt):  # which is how it is ended
        ready(f"http://{name}:{listener.getsockname()[1]}/")
        uvicorn.Server(uvicorn.Config(page, log_level="warning", access_log=False)).run(sockets=[listener])
