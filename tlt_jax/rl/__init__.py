"""Reinforcement learning: tasks, rewards, rollouts, losses, learner."""
