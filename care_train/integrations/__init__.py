"""CARE inside other trainers: `integrations.trl`."""
