"""make for stages: finished runs are reused, missing ones trained, interrupted ones resumed."""
