"""What a worker process says besides verdicts."""

READY = b"ready"
"""It has started."""

TAKEN = b"taken"
"""It has read an item: from now on its death is the item's."""
