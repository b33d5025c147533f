"""A web page where every stage answers, and a person chooses."""
