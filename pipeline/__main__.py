"""`python -m pipeline` is the command `coppice`. Knows nothing else."""

from pipeline.cli.app import main

if __name__ == "__main__":
    main()
