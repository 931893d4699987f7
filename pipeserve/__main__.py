"""Lets `python -m pipeserve` do what the `pipeserve` script does."""

from pipeserve.cli import main

if __name__ == "__main__":
    main()
