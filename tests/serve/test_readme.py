"""The README's example of a client, against a server of the model that it asks for."""

import re

from documents import ROOT, blocks
from served_http import open_llama, serving


def test_the_client_of_the_readme_runs(capsys):
    (example,) = [example for example in blocks(ROOT / "README.md", "python") if "OpenAI" in example]
    with serving([open_llama(name="packed-2-of-4")]) as served:
        here, count = re.subn(r"http://127\.0\.0\.1:8000", served.url, example)
        assert count == 1
        exec(compile(here, "README.md", "exec"), {})
        asked = {"model": "packed-2-of-4", "prompt": "The following example", "max_tokens": 16, "seed": 1}
        expected = served.client.completions.create(**asked).choices[0].text
    assert capsys.readouterr().out.startswith(f"{expected}\n")
