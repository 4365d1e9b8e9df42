"""`python -m splat`: the command line."""

from splat.cli import main

if __name__ == "__main__":
    main()
