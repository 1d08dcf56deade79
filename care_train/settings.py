"""The settings' former place: scripts written for version 0.1 import from here."""

from care_train.config import *  # noqa: F403
