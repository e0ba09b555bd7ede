"""`python -m excise` is the `excise` command."""

from excise.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
