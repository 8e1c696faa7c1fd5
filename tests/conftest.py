"""What holds for every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

programs = str(Path(sys.executable).parent)
if programs not in os.environ["PATH"].split(os.pathsep):  # as in an environment that is activated
    os.environ["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])
