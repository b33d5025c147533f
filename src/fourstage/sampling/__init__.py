"""Everything that draws tokens."""
