"""What the site needs beyond `docs/`: pages that stand elsewhere in the repository.

MkDocs calls these hooks (`mkdocs.yml`). On a forge all links are relative to the file;
here they lead to the page's place in the site, or say a path where there is none.
"""

import pathlib
import re

from mkdocs.structure import files

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Pages by their path in the repository and in the site.
PAGES = {"experiments/RESULTS.md": "results.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(found, config):
    """Adds the pages, and the pictures that they show."""
    for source, place in PAGES.items():
        text = (ROOT / source).read_text("utf-8")
        found.append(files.File.generated(config, place, content=text))
        for is_image, _, target, _ in _LINK.findall(text):
            if is_image:
                path = (ROOT / source).parent / target
                picture = files.File.generated(config, target, abs_src_path=str(path))
                found.append(picture)
    # This file is no page.
    found.remove(found.get_file_from_path("site.py"))
    return found


def on_page_markdown(markdown, page, config, files):
    """Leads links to where their target is in the site."""
    places = {place: source for source, place in PAGES.items()}
    here = ROOT / places.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead(link):
        is_image, text, target, anchor = link.groups()
        path = (here.parent / target).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor or ''})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor or ''})"
        if is_image:
            return link.group()
        return f"{text} (`{path}`)"

    return _LINK.sub(lead, markdown)
