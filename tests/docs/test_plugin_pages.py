"""The pages of plug-ins say what the code says."""

import dataclasses
import importlib
import re

import pytest

from documents import ROOT, code, default_words, rows, section
from sparity import registry


def own(kind):
    """Sparity's own plug-ins of a kind, without those that a test or another package registered."""
    return [name for name in registry.names(kind) if registry.get(kind, name).__module__.startswith("sparity.")]


KINDS = (
    *("stage", "prune.score", "prune.pattern", "prune.solver", "quantize.method", "quantize.grid", "structure.method"),
    *(
        "sparse_training.method",
        "heal.method",
        "activations.method",
        "activations.heal",
        "cache.policy",
        "attention.layout",
        "budget",
        "encoding",
    ),
)
PLUGINS = [(kind, name) for kind in KINDS for name in own(kind)]
STATISTICS = [("statistic", name) for name in own("statistic")]


def needs_of(kind, plugin):
    """The statistics that a plug-in reads, with its default options."""
    if kind == "stage":
        return sorted(plugin().needs().statistics)
    return sorted(plugin().statistics) if kind == "activations.method" else getattr(plugin, "needs", ())


def page_of(kind, name):
    return f"{kind.replace('.', '/')}/{name}.md"


@pytest.mark.parametrize(("kind", "name"), PLUGINS, ids=[f"{kind}.{name}" for kind, name in PLUGINS])
def test_a_plugin_has_a_page_with_its_options_defaults_statistics_and_sections(kind, name):
    plugin, text = registry.get(kind, name), (ROOT / "docs/methods" / page_of(kind, name)).read_text()
    assert text.startswith(f"# {name}\n")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    wanted = ["Formula", "Source", "Reference code and Sparity", "Options", "Statistics", "Recipe", "Pitfalls"]
    assert headings == wanted
    options = {cells[0]: cells[1] for cells in rows(section(text, "## Options"))[2:]}
    expected = options_of(kind, plugin)
    assert options == expected
    assert options or section(text, "## Options").strip() == "None."
    for statistic in needs_of(kind, plugin):
        assert f"`{statistic}`" in section(text, "## Statistics")
    for source in re.findall(r"arXiv:[\d.]+\d", source_of(plugin)):
        assert source in text


def options_of(kind, plugin):
    """Option -> default, as the tables write them."""
    if kind == "stage":
        return {f"`{name}`": default_words(field) for name, field in plugin.model_fields.items()}
    return {f"`{field.name}`": shown(field) for field in dataclasses.fields(plugin)}


@pytest.mark.parametrize(("kind", "name"), STATISTICS, ids=[name for _, name in STATISTICS])
def test_a_statistic_has_a_page_that_names_its_readers_and_its_key_in_a_store(kind, name):
    statistic, text = registry.get(kind, name), (ROOT / "docs/methods" / page_of(kind, name)).read_text()
    assert text.startswith(f"# {name}\n")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Formula", "Source", "Read by", "Bytes", "Pitfalls"]
    readers = {
        reader for other, reader in PLUGINS if other != "stage" and name in needs_of(other, registry.get(other, reader))
    }
    assert {word for word in code(section(text, "## Read by")) if word != "measure.layer_loss"} == readers
    assert any(key.startswith(f"{statistic.stored_as or name}.SITE") for key in code(section(text, "## Bytes")))
    for source in re.findall(r"arXiv:[\d.]+\d", source_of(statistic)):
        assert source in text


def shown(field):
    return "required" if field.default is dataclasses.MISSING else f"`{field.default}`"


def source_of(plugin):
    """The docstring of the plug-in's file, which names its paper."""
    return importlib.import_module(plugin.__module__).__doc__ or ""


def test_the_index_lists_every_plugin_with_what_it_needs():
    text = (ROOT / "docs/methods/README.md").read_text()
    listed = {(cells[0], cells[1]): cells[3:] for cells in rows(text)[2:]}
    assert listed.keys() == {(kind, f"[{name}]({page_of(kind, name)})") for kind, name in PLUGINS + STATISTICS}
    for (kind, link), (needs, group) in listed.items():
        plugin = registry.get(kind, link[1 : link.index("]")])
        if kind == "stage" and plugin.name != "prune":  # whose parts say it
            assert needs == ", ".join(f"`{need}`" for need in sorted(plugin().needs().statistics))
        if kind in ("prune.score", "prune.solver", "quantize.method", "activations.method"):
            assert needs == (", ".join(f"`{need}`" for need in needs_of(kind, plugin)) or "nothing")
        if kind == "prune.score":
            assert group == plugin.compare_within


def test_every_page_belongs_to_a_plugin():
    folder = ROOT / "docs/methods"
    pages = {str(path.relative_to(folder)) for path in folder.rglob("*.md")} - {"README.md"}
    assert pages == {page_of(kind, name) for kind, name in PLUGINS + STATISTICS}


def test_every_family_is_described():
    listed = {cells[0] for cells in rows((ROOT / "docs/models.md").read_text())[2:]}
    assert listed == {f"`{name}`" for name in own("family")}
