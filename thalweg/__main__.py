"""`python -m thalweg` is the `thalweg` command."""

from thalweg.cli.main import main

if __name__ == "__main__":
    main()
