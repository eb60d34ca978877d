"""The page at `/`: where the memory is, and a slider that moves it. Nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import FastAPI, Request, Response

_KINDS = {
    "index.html": "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
}
_POLICY = (
    "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def add_dashboard(app: FastAPI) -> None:
    """Serve the page and its two files."""
    for name, kind in _KINDS.items():
        _add(app, "/" if name == "index.html" else f"/{name}", name, kind)


def _add(app: FastAPI, path: str, name: str, kind: str) -> None:
    content = files(__package__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": tag,
    }

    @app.get(path, include_in_schema=False)
    async def page(http: Request) -> Response:
        if http.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)
