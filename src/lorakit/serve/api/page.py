"""The page at `/`: the playground, the adapters and the load, as files that need nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).parent.parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # Its files belong together: after an upgrade none of them may come from a browser's cache.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


def add_page(app: FastAPI) -> frozenset[str]:
    """Add the page's files to an application, each at a path of its own: what is unknown stays the API's to answer.

    Returns:
        The paths; they need no API key, as the page asks for one itself.
    """
    paths = {f"/{file.name}": file for file in _FOLDER.iterdir() if file.suffix in _TYPES}
    paths["/"] = paths.pop("/index.html")
    for path, file in paths.items():
        app.add_api_route(path, _reply(file), methods=["GET", "HEAD"], include_in_schema=False)
    return frozenset(paths)


def _reply(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, media_type = file.read_bytes(), _TYPES[file.suffix]

    async def reply(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return reply
