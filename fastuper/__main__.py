"""`python -m fastuper` is the command `fastuper`."""

from .cli import main

if __name__ == "__main__":
    main()
