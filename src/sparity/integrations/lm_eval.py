"""`python -m sparity.integrations.lm_eval`: lm-evaluation-harness's own command line with `--model sparity`.

The harness scans no entry points, so a model of another package must be imported before its command line starts.
"""

import os
import sys

from sparity.errors import SparityError
from sparity.measure.tasks.names import FILES
from sparity.measure.tasks.running import missing


def arguments(given: list[str]) -> list[str]:
    """The harness's arguments; the local task files are among its tasks (`own_arc_easy` ...) unless others are."""
    runs = "ls" not in given[:1] and "validate" not in given[:1] and given
    return [*given, "--include_path", str(FILES)] if runs and "--include_path" not in given else given


def main() -> None:
    """Run the harness."""
    if reason := missing():
        raise SystemExit(f"error: {reason}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval.__main__ as harness

    import sparity.measure.tasks.harness_model  # noqa: F401  # registers the model

    sys.argv = ["lm_eval", *arguments(sys.argv[1:])]
    try:
        harness.cli_evaluate()
    except SparityError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
