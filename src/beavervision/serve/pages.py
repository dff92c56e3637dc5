"""The web pages: the files under ``web/``, held in memory and sent with headers that let nothing else run in them.

A page is asked for at each visit (``no-cache`` with an ETag). What it loads lies under an address with a digest of all
files, so that it may be cached for ever and a page never meets a script of another version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import FastAPI, Request, Response

from beavervision.evaluate.samples import portrait
from beavervision.serve.problems import Problem

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_SAMPLE = "sample.png"  # the portrait that ships in the package
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Permissions-Policy": "camera=(self), microphone=(self), geolocation=(), usb=(), payment=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_FILE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "public, max-age=31536000, immutable",
}


def add_pages(app: FastAPI) -> None:
    """Serve ``index.html`` at ``/``, any other page at its name, and what they load below ``/web/<digest>/``."""
    folder = files("beavervision") / "serve" / "web"
    found = {e.name: e.read_bytes() for e in folder.iterdir() if PurePosixPath(e.name).suffix in _KINDS}
    with portrait() as sample:
        found[_SAMPLE] = sample.read_bytes()
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(found.items()))).hexdigest()[:16]
    pages = {name: data for name, data in found.items() if name.endswith(".html")}

    for name, data in pages.items():
        stem = name.removesuffix(".html")
        path = "/" if stem == "index" else f"/{stem}"
        body = re.sub(rb'(href|src)="/web/', rb'\1="/web/' + digest.encode() + b"/", data)
        app.add_api_route(path, _page(body, f'"{digest}"'), methods=["GET", "HEAD"], include_in_schema=False)

    @app.api_route("/web/{version}/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def part(version: str, name: str) -> Response:
        data = found.get(name)
        if data is None or version != digest or name in pages:
            raise Problem(404, "no_page", "There is no such file in this version. Load the page again.")
        return Response(data, media_type=_KINDS[PurePosixPath(name).suffix], headers=_FILE_HEADERS)


def _page(body: bytes, etag: str) -> Callable[[Request], Response]:
    headers = {**_PAGE_HEADERS, "ETag": etag}

    def page(request: Request) -> Response:
        known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
        if etag in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=_KINDS[".html"], headers=headers)

    return page
