"""What the pack's routes share: who is answered, and how a refusal looks."""

from urllib.parse import urlsplit

from aiohttp import web

FOREIGN = "Open ComfyUI's own page: another site has sent this"


def foreign(request: web.Request) -> bool:
    """Whether a page of another site sends a request."""
    headers = request.headers
    return not same_site(headers.get("Origin"), headers.get("Sec-Fetch-Site"), request.host)


def same_site(origin: str | None, fetched: str | None, host: str) -> bool:
    """Whether a request comes from a page of this server or from no page at all, by what browsers send of it: Origin
    with each POST, and Sec-Fetch-Site, which no page can change."""
    if fetched is not None:  # behind a proxy, the host may have another name than the page's
        return fetched in ("same-origin", "none")
    return origin is None or urlsplit(origin).netloc == host


def refused(status: int, text: str) -> web.Response:
    """An answer with a text for people."""
    return web.json_response({"error": text}, status=status)
