"""`python -m fastuper`: the command `fastuper`."""

from fastuper.cli import main

if __name__ == "__main__":
    main()
