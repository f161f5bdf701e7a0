"""python -m sfi_local"""

import sys

from sfi_local.cli import main

sys.exit(main())
