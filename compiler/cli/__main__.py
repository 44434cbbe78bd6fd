"""``python -m plait.compiler.cli``: the command line where no ``plait`` is installed."""

from . import main

if __name__ == "__main__":
    main()
