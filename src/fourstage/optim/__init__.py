"""Muon, on one device, shared among ranks, and under ZeRO."""
