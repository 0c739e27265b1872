"""`python -m increlora.workbench.cli`: the same as the console script."""

from . import main

if __name__ == "__main__":
    main()
