"""A pass that makes a smaller model of the whole one, from the checkpoint that the pass before it left."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from sparity.models import Decoder
from sparity.pipeline.run.export import plain_shard
from sparity.pipeline.run.finished_pass import MODEL, Done, dense_block, with_kept
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.pipeline.run.passes import Setting
from sparity.pipeline.run.planned import PlannedPass, PlannedStage
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.whole_pass import commit_whole
from sparity.stages import Change, ShapeStage

SHARED = ("hidden_size", "depth", "attention")  # dimensions of the model, not of a block


def run_reshaping(planned: PlannedPass, setting: Setting, folder: PassFolder, progress: Progress, before: Done) -> Done:
    """Make the smaller model and write its checkpoint; what is committed of it already is not done again."""
    (each,) = planned.stages
    total = len(each.stage.after(each.model, each.draft))
    found = commit_whole(planned, setting, folder, progress, total, partial(_reshape, each, setting, folder, total))
    return _done(each, setting.opened.decoder, found, folder, before)


def _reshape(each: PlannedStage, setting: Setting, folder: PassFolder, total: int) -> dict[str, Any]:
    stage, opened = each.stage, setting.opened
    assert isinstance(stage, ShapeStage)
    model = setting.load()
    shaped = stage.reshape(model, opened.tokens, each.draft)
    kept = {name: _plain(units) for name, units in shaped.kept.items()}
    smaller = Decoder.open(shaped.model, opened.decoder.device, opened.decoder.dtype)
    depth, changes = kept.get("depth") or list(range(len(opened.decoder))), []
    folder.save_shard(plain_shard(1, total + 1), smaller.rest())
    for index in range(total):
        old = {p.name: p for site in opened.decoder.sites(depth[index]) for p in site.projections}
        experts = _of_block(kept.get("experts"), depth[index])
        renamed = _names(opened.decoder, depth, index, experts)
        shapes = {renamed.get(name, name): p.weight.shape for name, p in old.items()}
        with smaller.block(index) as block:
            folder.save_shard(plain_shard(index + 2, total + 1), smaller.export(block))
            changes.append([asdict(Change.of(stage.name, p, index, shapes.get(p.name))) for p in block.projections])
    config = _changed(model.config, shaped.model.config)
    return {"kept": kept, "config": config, "changes": changes}


def _done(each: PlannedStage, decoder: Decoder, found: Mapping[str, Any], folder: PassFolder, before: Done) -> Done:
    """What is known of the run after this pass: what was done before is told in the new numbers."""
    kept: Mapping[str, Any] = found["kept"]
    done = replace(
        before,
        decisions=(*before.decisions, each.draft),
        records=(*_renumbered(before, decoder, kept), *folder.committed.records),
        config={**before.config, **found["config"]},
    )
    for name, units in kept.items():
        if name in SHARED:
            continue
        for index in range(len(decoder)):
            here = _of_block(units, index)
            if here is not None:
                done = with_kept(done, decoder.block_name(dense_block(before, index)), {name: here})
    shared = {name: kept[name] for name in ("hidden_size", "depth") if name in kept}
    if "attention" in kept:
        silent = {dense_block(before, i) for i in range(len(decoder)) if i not in kept["attention"]}
        was = done.kept.get(MODEL, {}).get("attention") or [dense_block(before, i) for i in range(len(decoder))]
        heard = {**done.kept.get(MODEL, {}), "attention": [index for index in was if index not in silent]}
        done = replace(done, kept={**done.kept, MODEL: heard})
    return with_kept(done, MODEL, shared)


def _renumbered(before: Done, decoder: Decoder, kept: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The records so far, with the names that projections have now; those that are gone are left out."""
    depth = kept.get("depth") or list(range(len(decoder)))
    names: dict[str, tuple[str, int]] = {}
    for new, old in enumerate(depth):
        renamed = _names(decoder, depth, new, _of_block(kept.get("experts"), old))
        names |= {name: (now, new) for name, now in renamed.items()}
    return tuple(
        {
            **record,
            "changes": [
                {**change, "name": names[change["name"]][0], "block": names[change["name"]][1]}
                for change in record["changes"]
                if change["name"] in names
            ],
        }
        for record in before.records
    )


def _names(decoder: Decoder, depth: list[int], index: int, experts: list[int] | None) -> dict[str, str]:
    """The old name of each projection that is left of a block -> its new one."""
    found: dict[str, str] = {}
    old, new = f"{decoder.block_name(depth[index])}.", f"{decoder.block_name(index)}."
    for site in decoder.sites(depth[index]):
        for projection in site.projections:
            name, expert = projection.name.replace(old, new, 1), projection.expert
            if expert is not None and experts is not None:
                if expert not in experts:
                    continue
                name = _with_expert(name, new, expert, experts.index(expert))
            found[projection.name] = name
    return found


def _with_expert(name: str, prefix: str, old: int, new: int) -> str:
    """The name of an expert's projection with another number."""
    inside = name.removeprefix(prefix)
    return prefix + inside.replace(f".{old}.", f".{new}.", 1)


def _of_block(units: Any, index: int) -> list[int] | None:
    return None if units is None else units[index]


def _plain(units: Any) -> Any:
    """As lists of numbers."""
    if units is None or isinstance(units, int):
        return units
    return [_plain(each) for each in (units.tolist() if isinstance(units, torch.Tensor) else units)]


def _changed(old: Any, new: Any) -> dict[str, Any]:
    """The attributes of a configuration that are others now."""
    before, after = old.to_dict(), new.to_dict()
    return {name: value for name, value in after.items() if name not in before or before[name] != value}
