"""Task suites: how a model reads their questions, the harness that asks them, and files that lie on this machine."""
