"""The documentation as a site: every page in the navigation, every public name described, nothing from the network."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import sparity
from documents import BLOCK, DOCUMENTS, ROOT

SITE = ROOT / "docs/site"
BUILDS = all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo"))
PAGES = ("docs/site/contents.rst", "docs/site/api.rst", "docs/site/recipes.rst", "docs/eval.md", "README.md")
LOADED = {"link": "href", "object": "data", **dict.fromkeys(("script", "img", "iframe", "source", "embed"), "src")}


def entries(page):
    """The files to which the toctrees of a page lead, in order."""
    listed = re.findall(r"^   ([^:\s]\S*)$", page.read_text(), re.MULTILINE)
    found = []
    for entry in listed:
        name = f"{entry[1:] if entry.startswith('/') else page.parent.relative_to(ROOT) / entry}"
        home = (ROOT / name).parent.resolve()
        files = [file for file in sorted(home.glob(f"{name.rsplit('/')[-1]}.*")) if file.suffix in (".md", ".rst")]
        assert files != [], f"{page.name}: {entry}"
        found += files
    return found


def test_every_page_is_once_in_the_navigation():
    listed = entries(SITE / "contents.rst")
    kinds = [page for page in listed if page.parent.name == "kinds"]
    assert kinds != []
    listed += [page for kind in kinds for page in entries(kind)]
    own = {*SITE.rglob("*.rst")} - {SITE / "contents.rst"}
    cards = {ROOT / "src/sparity/zoo/llama/README.md", *(ROOT / "zoo").glob("*/README.md")}
    assert sorted(listed) == sorted({*DOCUMENTS, *own, *cards})


def test_every_public_name_is_once_on_the_page_of_the_interface():
    listed = re.findall(r"^\.\. auto\w+:: (\w+)", (SITE / "api.rst").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(sparity.__all__)


def test_no_document_shows_a_picture_from_the_network():
    shown = re.compile(r"!\[[^\]]*\]\((?:https?:)?//|<(?:img|script|iframe)\b")
    assert [path.name for path in DOCUMENTS if shown.search(BLOCK.sub("", path.read_text()))] == []


class Page(HTMLParser):
    """What a page loads, the anchors that it has, and where its links lead."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.anchors, self.links = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.anchors.add(values["id"])
        if values.get(LOADED.get(tag)):
            self.loaded.append(values[LOADED[tag]])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site of a few pages, which has the templates and the theme of all."""
    if not BUILDS:
        pytest.skip("sphinx, myst-parser or furo of the extra docs is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", SITE, "-d", out / "doctrees"]
    command += ["-D", f"include_patterns={','.join(PAGES)}", ROOT, out / "html"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    own = [line for line in said.splitlines() if "site/api" in line or "site/recipes" in line or "docstring" in line]
    assert own == []  # the others miss the pages that are left out
    return out / "html"


def outside(address):
    return re.match(r"([a-z]+:)?//", address.strip("'\" ")) is not None


def test_the_pages_load_nothing_from_elsewhere(site):
    styles = "\n".join(path.read_text() for path in site.rglob("*.css"))
    assert len(styles) > 1000
    loaded = re.findall(r"url\(([^)]*)\)", styles) + re.findall(r"@import\s+([^;]*)", styles)
    for path in site.rglob("*.html"):
        found = Page(path.read_text()).loaded
        assert [address for address in found if not outside(address) and not reached(path, address)] == []
        loaded += found
    assert [address for address in loaded if outside(address)] == []


def reached(page, address):
    return (page.parent / address.split("?")[0].split("#")[0]).exists()


def test_links_lead_to_pages_recipes_and_public_names(site):
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    described = pages[site / "docs/site/api.html"].anchors
    assert [name for name in sparity.__all__ if f"sparity.{name}" not in described] == []
    assert "site/recipes.html#recipes-eval" in pages[site / "docs/eval.html"].links
    assert "docs/site/recipes.html#recipes-methods" in pages[site / "README.html"].links
    assert 'url=README.html"' in (site / "index.html").read_text()
    for path in (site / "docs/site/api.html", site / "docs/site/recipes.html", site / "docs/eval.html"):
        for link in pages[path].links:
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if target in pages and anchor:
                assert anchor in pages[target].anchors, link
    text = (site / "docs/site/recipes.html").read_text()
    assert [path.name for path in (ROOT / "recipes").rglob("*.yaml") if f">{path.name}<" not in text] == []
