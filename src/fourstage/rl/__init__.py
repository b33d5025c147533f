"""Reinforcement learning: pure maths (ops), text to reward (rewards), sampling (rollout)."""
