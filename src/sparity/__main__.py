"""`python -m sparity`: the command line of the interpreter at hand, as launchers of several processes call it."""

from sparity.cli.main import main

if __name__ == "__main__":
    main()
