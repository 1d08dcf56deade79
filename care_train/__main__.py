"""`python -m care_train`, for launchers that start modules."""

import sys

from care_train.cli import main

sys.exit(main())
