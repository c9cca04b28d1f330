"""The certificate as an HTML page of one file: tables, and pictures by ours, by theirs, and their difference."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from benchmarks.parity.pictures import Picture

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border-bottom: 1px solid #ddd; padding: .2rem .7rem }
td { font-variant-numeric: tabular-nums } figure { display: inline-block; margin: .5rem }
figure img { width: 128px; height: 128px; image-rendering: pixelated; border: 1px solid #ddd } pre { overflow-x: auto }
figcaption { font-size: 13px; color: #555; max-width: 26rem }
"""


def page(title: str, sections: Sequence[tuple[str, str]], pictures: Sequence[Picture]) -> str:
    """Return the page; a section is a heading and a Markdown table or plain text."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, text in sections:
        shown = _table(text) if text.startswith("|") else f"<pre>{html.escape(text)}</pre>"
        body += [f"<h2>{html.escape(heading)}</h2>", shown]
    if pictures:
        body.append("<h2>Pictures: ours, theirs, the difference times 51</h2>")
    for p in pictures:
        images = "".join(f'<img src="{_embedded(i)}" alt="">' for i in (p.ours, p.theirs, p.amplified))
        caption = f"{p.what}: {p.levels.max()} of 255 levels at most"
        body.append(f"<figure>{images}<figcaption>{html.escape(caption)}</figcaption></figure>")
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _table(markdown: str) -> str:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows[2:]]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _embedded(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
