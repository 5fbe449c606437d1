"""`sparity offload`, and `sparity generate --memory`."""

import sparity as package


def test_a_model_is_written_and_runs_in_less_memory(sparity, tmp_path):
    far = tmp_path / "far"
    done = sparity("offload", "zoo:moe", "-o", far, "--samples", 2, "--length", 32, "--memory", "6MB")
    assert done.code == 0, done.err
    first, second = done.out.splitlines()
    assert first.startswith(
        f"{far}: 7.1 MB on disk in records of 147.5 kB (a router names experts, which are on disk), "
    )
    assert first.endswith("4.8 MB is the least that it runs in")
    assert second.startswith("within 6MB: a token needs 1.77 MB of what is on disk and misses ")
    told = sparity("generate", far, "The with statement", "--tokens", 4, "--memory", "6MB", "--stats", "--json")
    assert told.code == 0
    assert "tokens/s" in told.err
    wanted = package.load("zoo:moe")
    tokenizer = package.models.loading.load_tokenizer("zoo:moe")
    ids = tokenizer("The with statement", return_tensors="pt")["input_ids"]
    made = wanted.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert told.json["ids"] == made.tolist()
    shown = sparity("generate", far, "The with statement", "--tokens", 4, "--memory", "6MB", "--stats")
    assert "units were needed" in shown.err


def test_json_and_what_is_refused(sparity, tmp_path):
    far = tmp_path / "far"
    done = sparity("offload", "zoo:relu", "-o", far, "--samples", 1, "--length", 16, "--json").json
    assert (done["kind"], done["far_bytes"], done["tokens"]) == ("output", 6 * 768 * 192 * 2, 12)
    for arguments, words in (
        (("offload", "zoo:relu", "-o", far), "is there already"),
        (("offload", "zoo:llama", "-o", tmp_path / "other"), "nothing in this model says which neurons count"),
        (("generate", far, "The"), "open it with sparity.load_offloaded, or sparity generate --memory"),
        (("generate", far, "The", "--memory", "5MB"), "memory 5.0 MB does not suffice"),
        (("generate", far, "The", "--memory", "plenty"), "memory 'plenty': bytes, or a number"),
        (("generate", "zoo:relu", "The", "--memory", "1GB"), "holds no sparity-offload.json"),
    ):
        refused = sparity(*arguments)
        assert refused.code == 1
        assert words in refused.err
        assert len(refused.err.splitlines()) == 1
