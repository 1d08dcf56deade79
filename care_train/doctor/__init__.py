"""`care-train doctor`: what would go wrong in a run, found before it starts.

Each check is one function that returns one `Finding`; a check that breaks is an error finding.
"""
