"""CARE inside other trainers: `integrations.trl`, `integrations.verl`."""
