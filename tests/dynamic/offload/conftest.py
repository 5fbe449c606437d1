"""Models that are written once."""

import pytest
from offloaded import CALIBRATION, with_stage

from sparity.dynamic.offload import loading
from sparity.dynamic.offload.writing import offload


@pytest.fixture(autouse=True)
def disk(monkeypatch):
    """Tests time nothing: a disk of 1 GB/s."""
    monkeypatch.setattr(loading, "disk_speeds", lambda bundles, pool, threads: (1e9, 1e9))


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A function: (source, dtype) -> what was written for it, once."""
    known = {}

    def write(source, dtype="float32", **options):
        key = (source, dtype, str(options))
        if key not in known:
            folder = tmp_path_factory.mktemp("far")
            plain = with_stage(source, folder / "plain", dtype, **options) if options else source
            known[key] = plain, offload(plain, folder / "far", tokens=CALIBRATION, dtype=dtype)
        return known[key]

    return write
