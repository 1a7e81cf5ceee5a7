"""The token of the server as a cookie, for browsers: a page that asks for it."""

import hmac
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

LOGIN, COOKIE = "/login", "framepack_token"
# Bytes of a form with a token, at most.
MAX_BODY = 4096
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>framepack</title>
<body style="font: 16px system-ui, sans-serif; max-width: 20em; margin: 4em auto; padding: 0 1em">
<h1 style="font-size: 1.3em">framepack</h1>
<form method="post" action="/login">
<label>Token of the server<br>
<input name="token" type="password" autocomplete="current-password" autofocus
 style="width: 100%; padding: .5em; margin: .5em 0"></label>
<p style="color: #b91c1c">MESSAGE</p>
<button style="padding: .5em 1em">Open</button>
</form></body></html>
"""


def login_page(message: str = "") -> HTMLResponse:
    """Return the page that asks for the token."""
    return HTMLResponse(PAGE.replace("MESSAGE", message), 401)


def add_login(app: FastAPI, token: str) -> None:
    """Add the route that takes the token of the page, and gives the browser a cookie."""

    @app.post(LOGIN)
    async def login(request: Request) -> Response:
        body = await request.body()
        given = parse_qs(body[:MAX_BODY].decode(errors="replace")).get("token", [""])[0]
        if not hmac.compare_digest(given.strip().encode(), token.encode()):
            return login_page("This is not the token.")
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure)
        return answer
