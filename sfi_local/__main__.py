"""python -m sfi_local"""

import sys

from sfi_local.cli.main import main

sys.exit(main())
