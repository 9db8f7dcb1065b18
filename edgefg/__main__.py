"""`python -m edgefg`: the command line."""

from edgefg.cli import main

if __name__ == "__main__":
    main()
