"""The frozen suite: what every stage is asked, and what its answers come to."""
