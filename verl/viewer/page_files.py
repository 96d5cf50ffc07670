"""The files of the page: one by one for a browser that asks the server, or all in one with the data."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec

from spatialthinker.visualize import render_style

FOLDER = Path(__file__).with_name("page")
FILES = {"/": "text/html", "/look.css": "text/css", "/viewer.css": "text/css", "/icon.svg": "image/svg+xml"} | {
    f"/{path.name}": "text/javascript" for path in sorted(FOLDER.glob("*.js"))
}
"""Media types of what a browser may ask for."""
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>\n')
_LINK = re.compile(r"<link [^>]*>\n")


def read_page_file(path: str) -> tuple[bytes, str]:
    """Return a file in FILES and its media type."""
    if path == "/look.css":
        return render_style().encode(), "text/css; charset=utf-8"
    name = "index.html" if path == "/" else path.removeprefix("/")
    return (FOLDER / name).read_bytes(), f"{FILES[path]}; charset=utf-8"


def write_single_page(data: Any) -> str:
    """Return the page with these data in it: a file that asks for nothing and runs nothing but its own program."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    program = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPT.findall(page))
    style = f"{render_style()}\n{(FOLDER / 'viewer.css').read_text(encoding='utf-8')}"
    policy = f"default-src 'none'; img-src data:; script-src {_digest(program)}; style-src {_digest(style)}"
    # No text in the data may end their element or begin a comment in it.
    text = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n'
    body = f'<script type="application/json" id="data">{text}</script>\n<script>{program}</script>\n'
    page = _SCRIPT.sub("", _LINK.sub("", page))
    return page.replace("</head>", f"{head}</head>").replace("</body>", f"{body}</body>")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
