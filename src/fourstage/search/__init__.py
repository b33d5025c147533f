"""Bayesian search over train.py's settings, by Optuna; a trial is a list of overrides."""
