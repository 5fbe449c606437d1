"""Models of the zoo by name: in the package, in a checkout, and where a wheel does not have them."""

import re
from pathlib import Path

import pytest

import sparity
from sparity import zoo
from sparity.errors import InvalidInput
from sparity.models.transformers import locate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_is_a_folder_that_a_checkout_has(name):
    assert (zoo.path(name) / "model.safetensors").is_file()
    assert locate(f"zoo:{name}") == zoo.path(name)


def test_the_bundled_model_is_in_the_package_and_the_others_are_not():
    package = Path(sparity.__file__).parent
    assert zoo.path("llama").is_relative_to(package)
    assert zoo.path("relu") == ROOT / "zoo" / "relu"
    assert zoo.path("moe") == ROOT / "zoo" / "moe"


def test_all_models_together_stay_small():
    sizes = {name: sum(file.stat().st_size for file in zoo.path(name).iterdir()) for name in zoo.MODELS}
    assert sizes["llama"] <= 20e6
    assert sum(sizes.values()) <= 32e6


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        InvalidInput,
        match=re.escape('no model "rellu" in the zoo; did you mean "relu"? (models: llama, relu, moe, smollm2)'),
    ):
        zoo.path("rellu")


def test_an_installed_package_says_where_the_model_is_and_what_to_do(tmp_path, monkeypatch):
    package = tmp_path / "lib/python3.11/site-packages/sparity/zoo"
    monkeypatch.setattr(zoo, "__file__", str(package / "__init__.py"))
    with pytest.raises(InvalidInput) as refused:
        zoo.path("moe")
    assert str(refused.value) == (
        "zoo:moe is not in the installed package, only in Sparity's repository: clone that and give the folder "
        f"zoo/moe, or install the clone with pip install -e (looked for {tmp_path}/lib/python3.11/zoo/moe)"
    )
