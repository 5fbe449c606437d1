"""`sparity plan --roofline`: said before anything is pruned."""


def test_plan_says_where_there_is_no_real_speed(sparity, recipe_file):
    recipe = recipe_file({"score": "magnitude"})
    found = sparity("plan", recipe, "--roofline", "--prompt", 16, "--batch", 2, "--json").json["roofline"]
    assert len(found) == 6
    assert [one["real"] for one in found] == [False] * 6
    assert all(one["gains"] == [1.0, 1.0] for one in found)
    assert (found[0]["prompt"], found[0]["batch"]) == (16, 2)
    printed = " ".join(sparity("plan", recipe, "--roofline").out.split())
    assert "A100 80 GB SXM, H100 SXM, H200 SXM, B200, RTX 4090: NO REAL SPEED HERE; zeros that lie so" in printed
    assert "roofline" in sparity("plan", recipe, "--json").json
    assert "REAL SPEED" not in sparity("plan", recipe).out
