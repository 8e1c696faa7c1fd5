"""`python -m safeloop` is the command `safeloop`."""

from __future__ import annotations

from safeloop.cli.main import main

if __name__ == "__main__":
    main()
