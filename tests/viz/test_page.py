"""Parts of the report's page, letter by letter: whatever comes in is escaped."""

import html.parser

import pytest

from tlt_jax.viz import page

ODD, SAFE = '<b a="x">\'&', "&lt;b a=&quot;x&quot;&gt;&#x27;&amp;"


def test_tiles():
    assert page.tiles({"reward": "0.5", ODD: ODD}) == (
        '<div class="tiles">'
        '<div class="tile"><b>0.5</b><span>reward</span></div>'
        f'<div class="tile"><b>{SAFE}</b><span>{SAFE}</span></div>'
        "</div>"
    )


def test_plots_are_within_the_page():
    assert page.plots([("name", b"\x89PNG", ODD)]) == (
        '<div class="plots"><figure><img alt="name" '
        'src="data:image/png;base64,iVBORw=="><figcaption>'
        f"{SAFE}</figcaption></figure></div>"
    )


@pytest.mark.parametrize("reward,kind", [(0.0, "poor"), (-1, "poor"), (1e-9, "good")])
def test_an_answer_marks_what_was_drafted(reward, kind):
    shown = page.Answer(
        about="the longest",
        reward=reward,
        prompt=ODD,
        reference=None,
        pieces=[("a", False), (ODD, True), ("", False), ("z", True)],
    )
    made = page.answer(shown)
    assert f'<span class="{kind}">reward {reward:.3g}</span> the longest</p>' in made
    assert f'<pre class="prompt">{SAFE}</pre>' in made
    assert f"<pre>a<mark>{SAFE}</mark><mark>z</mark></pre></div>" in made
    made = page.answer(shown._replace(reference=ODD, reward=0.123456))
    assert f"reward 0.123</span> the longest · right answer: {SAFE}</p>" in made


def test_tables_folds_and_sections():
    assert page.table(["step", ODD], [["1", "2"], [ODD, "4"]]) == (
        '<div class="scroll"><table>'
        f"<tr><th>step</th><th>{SAFE}</th></tr>"
        "<tr><td>1</td><td>2</td></tr>"
        f"<tr><td>{SAFE}</td><td>4</td></tr>"
        "</table></div>"
    )
    assert page.folded(ODD, ODD) == (
        f"<details><summary>{SAFE}</summary><pre>{SAFE}</pre></details>"
    )
    # The body is HTML already.
    assert page.section(ODD, "<i>x</i>") == f"<h2>{SAFE}</h2><i>x</i>"
    assert page.section("t", "<i>x</i>", ODD) == (
        f'<h2>t</h2><p class="note">{SAFE}</p><i>x</i>'
    )


class Tags(html.parser.HTMLParser):
    """Checks that what is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_its_parts_and_loads_nothing():
    parts = [page.section("one", page.tiles({"a": "1"})), page.folded("two", ODD)]
    made = page.page(ODD, ODD, parts)
    assert made.startswith("<!doctype html>\n<html lang=") and made.endswith(
        "</html>\n"
    )
    assert f"<title>{SAFE}</title>" in made
    assert f'<h1>{SAFE}</h1><p class="sub">{SAFE}</p>' in made
    assert "\n".join(parts) + "</main>" in made
    tags = Tags()
    tags.feed(made)
    assert tags.open == []
    assert ("meta", {"charset": "utf-8"}) in tags.seen
    policy = {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    }
    assert ("meta", policy) in tags.seen
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "iframe", "a"}
