"""What the processes of `FastRun` have imported before they start."""

from care_train.cli import quiet_libraries

quiet_libraries()

import care_train.commands  # noqa: E402
import care_train.training.guard  # noqa: E402, F401
