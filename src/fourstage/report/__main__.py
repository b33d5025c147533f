"""`python -m fourstage.report`."""

import sys

from fourstage.report import main

sys.exit(main(sys.argv[1:]))
