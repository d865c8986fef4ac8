"""The page of a run's report: HTML in one file that loads nothing from anywhere.

Whatever comes from a run is escaped. The page forbids the browser to load anything but
what it holds itself.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { --ink: #1b1f24; --soft: #5f6b7a; --line: #dfe3e8; --card: #ffffff;
  --page: #f5f6f8; --draft: #bfe8d8; --bad: #f3d9cf; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
.sub, .note { color: var(--soft); margin: 0 0 14px; }
.tiles { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
.tile, figure, .answer { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tile { padding: 10px 14px; }
.tile b { display: block; font-size: 21px; }
.tile span { color: var(--soft); font-size: 13px; }
.plots { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); }
figure { margin: 0; padding: 10px; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; max-width: 900px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; padding: 4px 4px 0; }
.answer { margin: 0 0 12px; padding: 12px 16px; }
.answer p { margin: 0 0 6px; }
.answer pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.prompt { color: var(--soft); border-left: 3px solid var(--line);
  padding-left: 10px; margin-bottom: 8px !important; }
mark { background: var(--draft); color: inherit; border-radius: 3px; }
.good, .poor { border-radius: 4px; padding: 1px 7px; font-weight: 600; }
.good { background: var(--draft); } .poor { background: var(--bad); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: right; padding: 4px 10px; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); }
details pre { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 12px; overflow-x: auto; font-size: 12px; }
"""


class Answer(NamedTuple):
    """A completion to be shown; `about` says which one it is.

    `reference` is the right answer, if there is one, `pieces` the text in parts, each
    with whether it had been drafted.
    """

    about: str
    reward: float
    prompt: str
    reference: str | None
    pieces: Sequence[tuple[str, bool]]


def tiles(values: Mapping[str, str]) -> str:
    """Lay numbers out side by side, by what they are."""
    made = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span></div>'
        for name, value in values.items()
    )
    return f'<div class="tiles">{made}</div>'


def plots(pictures: Sequence[tuple[str, bytes, str]]) -> str:
    """Lay plots out: `(name, PNG, caption)` each."""
    made = "".join(
        f'<figure><img alt="{_text(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}"><figcaption>{_text(caption)}</figcaption>'
        "</figure>"
        for name, png, caption in pictures
    )
    return f'<div class="plots">{made}</div>'


def answer(shown: Answer) -> str:
    """Show a completion; what had been drafted is marked."""
    kind = "good" if shown.reward > 0 else "poor"
    known = shown.reference is not None
    wanted = f" · right answer: {_text(shown.reference)}" if known else ""
    body = "".join(
        f"<mark>{_text(text)}</mark>" if drafted else _text(text)
        for text, drafted in shown.pieces
    )
    return (
        f'<div class="answer"><p><span class="{kind}">reward {shown.reward:.3g}</span> '
        f"{_text(shown.about)}{wanted}</p>"
        f'<pre class="prompt">{_text(shown.prompt)}</pre><pre>{body}</pre></div>'
    )


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows of cells out under their names."""
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def folded(title: str, text: str) -> str:
    """Hide a longer text behind its title."""
    title, text = _text(title), _text(text)
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def section(title: str, body: str, note: str = "") -> str:
    """Put a heading, and a line that explains, before a part of the page."""
    told = f'<p class="note">{_text(note)}</p>' if note else ""
    return f"<h2>{_text(title)}</h2>{told}{body}"


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """Make the whole page of parts that are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{_text(title)}</h1><p class="sub">{_text(subtitle)}</p>'
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _text(value: str) -> str:
    # Halves of characters, which a record may hold and no page can, become `?`.
    whole = str(value).encode("utf-8", "replace").decode()
    return html.escape(whole, quote=True)
