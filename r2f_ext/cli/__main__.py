"""`python -m r2f_ext.cli`."""

import sys

from r2f_ext.cli import main

sys.exit(main())
