"""make for stages: what is there is reused, what is missing trained, what was stopped resumed."""
