"""Recipes on a page of the site, a section for each folder; links of the documents to such a folder lead there."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def anchor(folder: Path) -> str:
    """The section of a folder: `recipes/methods/heal` is `recipes-methods-heal`."""
    return nodes.make_id("-".join(folder.parts))


class Recipes(SphinxDirective):
    """Every recipe of the repository in full."""

    def run(self) -> list[nodes.Node]:
        """A section for each folder that holds recipes, and one for each that holds only folders."""
        root = Path(self.env.srcdir)
        folders = [path for path in [root / "recipes", *sorted((root / "recipes").rglob("*"))] if path.is_dir()]
        return [self._section(root, folder.relative_to(root)) for folder in folders]

    def _section(self, root: Path, folder: Path) -> nodes.section:
        name = anchor(folder)
        section = nodes.section("", nodes.title("", str(folder)), ids=[name])
        self.env.domains.standard_domain.note_hyperlink_target(name, self.env.docname, name, str(folder))
        for file in sorted((root / folder).glob("*.yaml")):
            self.env.note_dependency(str(file))
            text = file.read_text(encoding="utf-8")
            section += nodes.rubric("", "", nodes.literal("", file.name))
            section += nodes.literal_block(text, text, language="yaml")
        return section


def to_sections(app: Sphinx, document: nodes.document) -> None:
    """Makes links to a folder of recipes, which is no document of its own, links to its section."""
    root = Path(app.srcdir)
    page = Path(app.env.doc2path(app.env.docname))
    for link in document.findall(addnodes.pending_xref):
        folder = (page.parent / link["reftarget"]).resolve()
        if folder.is_relative_to(root / "recipes") and folder.is_dir():
            link["refdomain"], link["reftype"], link["refexplicit"] = "std", "ref", True
            link["reftarget"] = anchor(folder.relative_to(root))


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive and the links."""
    app.add_directive("recipes", Recipes)
    app.connect("doctree-read", to_sections)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
