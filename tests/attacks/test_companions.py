"""Files beside the weights: what a model needs is copied, and nothing is read through a link that leads elsewhere."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

import sparity
from sparity.checkpoints.companions import companions, everything
from sparity.errors import InvalidInput, SparityError
from sparity.pipeline.run.packing import convert

SECRET = "the password is swordfish"
NEEDED = (
    "tokenizer_config.json", "tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja", "generation_config.json",
    "qwen.tiktoken", "LICENSE", "LICENCE.md", "License.txt", "MODEL_LICENSE", "NOTICE", "Notice.txt", "COPYING",
    "USE_POLICY.md", "THIRD_PARTY_NOTICES.txt", "LICENSES/Apache-2.0.txt",
)  # fmt: skip
LEFT = ("README.md", "optimizer.pt", "trainer_state.json", "modeling_odd.py", "photo.png", "runs/LICENSE")


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{{}} {name}" if not name.endswith(".json") else "{}")


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "elsewhere" / "secret.txt"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def given(recipe, model_copy):
    return recipe({"score": "magnitude"}, model=str(model_copy))


def test_all_that_makes_a_model_usable_and_lawful_is_copied(given, model_copy, tmp_path):
    put(model_copy, *NEEDED, *LEFT)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert set(NEEDED) <= set(companions(model_copy))
    (model_copy / "tokenizer.model").unlink()  # no tokenizer can be made of these
    (model_copy / "vocab.txt").unlink()
    (model_copy / "tokenizer_config.json").unlink()
    sparity.run(given, output=tmp_path / "out", device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "sparity.json").read_text())
    here = [name for name in NEEDED if (model_copy / name).exists()]
    for name in here:
        assert (tmp_path / "out" / name).read_bytes() == (model_copy / name).read_bytes()
        assert f"\n- {name}\n" in card.replace("\\", "")
        assert name in record["files"]
    for name in LEFT:
        assert name == "README.md" or not (tmp_path / "out" / name).exists()


def test_several_chat_templates_survive_pruning_and_packing(recipe, stories_model, tmp_path):
    from transformers import AutoTokenizer

    folder = shutil.copytree(stories_model, tmp_path / "model")
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text("default {{ messages[0].content }}")
    put(folder, "additional_chat_templates/tool_use.jinja", "NOTICE")
    expected = AutoTokenizer.from_pretrained(folder).chat_template
    assert set(expected) == {"default", "tool_use"}
    sparity.run(recipe({"score": "magnitude"}, model=str(folder)), output=tmp_path / "out", device="cpu")
    convert(tmp_path / "out", tmp_path / "packed")
    for made in ("out", "packed"):
        assert AutoTokenizer.from_pretrained(tmp_path / made).chat_template == expected
        assert (tmp_path / made / "NOTICE").is_file()
    record = json.loads((tmp_path / "packed" / "sparity.json").read_text())
    assert "additional_chat_templates/tool_use.jinja" in record["files"]


def refused(given, folder, tmp_path, words):
    for use in (
        lambda: sparity.run(given, output=tmp_path / "out", device="cpu"),
        lambda: convert(folder, tmp_path / "out"),
    ):
        with pytest.raises(InvalidInput, match=words):
            use()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "name", ["LICENSE", "generation_config.json", "NOTICE.txt", "additional_chat_templates/a.jinja", "vocab.bpe"]
)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_link_to_elsewhere_is_refused_by_name(given, model_copy, tmp_path, secret, name, relative):
    path = model_copy / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(secret, path.parent) if relative else secret)
    refused(given, model_copy, tmp_path, f"{path} is no ordinary file of the model's folder, a link to .*secret")


def a_chain(folder, secret):
    (folder / "step").symlink_to(secret)
    (folder / "LICENSE").symlink_to("step")


def a_linked_folder(folder, secret):
    secret.rename(secret.with_suffix(".jinja"))
    (folder / "additional_chat_templates").symlink_to(secret.parent)


def a_folder_of_blobs_that_is_none(folder, secret):
    """Only a snapshot may link to blobs beside it."""
    secret.parent.rename(folder.parent.parent / "blobs")
    (folder / "LICENSE").symlink_to("../../blobs/secret.txt")


def nowhere(folder, secret):
    (folder / "NOTICE").symlink_to("gone")


def a_loop(folder, secret):
    (folder / "NOTICE").symlink_to("NOTICE")


def a_device(folder, secret):
    (folder / "LICENSE").symlink_to("/dev/zero")


def a_pipe(folder, secret):
    os.mkfifo(folder / "LICENSE")


def a_socket(folder, secret):
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    try:
        os.chdir(folder)  # a socket's name has 107 bytes at most
        listener.bind("NOTICE")
    finally:
        os.chdir(here)
        listener.close()


def the_configuration(folder, secret):
    shutil.move(folder / "config.json", secret)
    (folder / "config.json").symlink_to(secret)


def a_name_beyond_printing(folder, secret):
    (folder / os.fsdecode(b"LICENSE\xff")).write_text("x")


ODD = (
    a_chain, a_linked_folder, a_folder_of_blobs_that_is_none, nowhere, a_loop, a_device, a_pipe, a_socket,
    the_configuration, a_name_beyond_printing,
)  # fmt: skip


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_what_is_no_file_of_the_folder_is_refused(given, model_copy, tmp_path, secret, make):
    folder = tmp_path / "deep" / "model"
    folder.parent.mkdir()
    shutil.move(model_copy, folder)
    make(folder, secret)
    given["model"] = str(folder)
    refused(given, folder, tmp_path, "is no ordinary file of the model's folder|a name that no model card can show")


BOUNDED = """
import resource, sys
import sparity
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26, 1 << 26))
from sparity.pipeline.run.packing import convert
try:
    convert(sys.argv[1], sys.argv[2])
except sparity.SparityError as error:
    print("refused:", error)
"""


def test_endless_files_take_neither_time_nor_disk(model_copy, tmp_path):
    (model_copy / "LICENSE").symlink_to("/dev/zero")
    command = [sys.executable, "-c", BOUNDED, str(model_copy), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.startswith(f"refused: {model_copy}/LICENSE is no ordinary file"), done.stderr[-2000:]
    assert not list(tmp_path.glob("out*"))


def test_links_within_the_folder_and_to_the_hubs_blobs_are_followed(given, model_copy, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    shutil.move(model_copy, snapshot)
    put(snapshot, "additional_chat_templates/rag.jinja", "NOTICE")
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(path, blobs / f"{number:040x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:040x}", path.parent))
    (snapshot / "LICENSE").symlink_to("NOTICE")
    given["model"] = str(snapshot)
    sparity.run(given, output=tmp_path / "out", device="cpu")
    convert(snapshot, tmp_path / "packed")
    for made in ("out", "packed"):
        for name in ("NOTICE", "LICENSE", "additional_chat_templates/rag.jinja", "config.json"):
            assert (tmp_path / made / name).is_file()
            assert not (tmp_path / made / name).is_symlink()


def test_the_blobs_of_a_cache_are_files_and_no_links(given, model_copy, tmp_path, secret):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    shutil.move(model_copy, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "00").symlink_to(secret)
    (snapshot / "LICENSE").symlink_to("../../blobs/00")
    given["model"] = str(snapshot)
    refused(given, snapshot, tmp_path, "LICENSE is no ordinary file of the model's folder")


def test_data_for_run_time_that_is_a_link_is_refused(model_copy, tmp_path, secret):
    (model_copy / "sparity-dynamic").mkdir()
    (model_copy / "sparity-dynamic" / "00-x.safetensors").symlink_to(secret)
    with pytest.raises(SparityError, match="is no ordinary file of the model's folder"):
        everything(model_copy)
