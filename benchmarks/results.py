"""Where a benchmark's results go."""

import json
from pathlib import Path


def save(content, out=None):
    """Write results as JSON to a file, or print them where none is named."""
    text = json.dumps(content, indent=1)
    if out:
        Path(out).write_text(text + "\n")
    else:
        print(text)
