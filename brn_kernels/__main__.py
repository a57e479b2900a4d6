"""``python -m brn_kernels`` is the command ``brn``."""

import sys

from .cli import main

sys.exit(main())
