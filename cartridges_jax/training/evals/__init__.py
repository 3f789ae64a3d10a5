"""Evaluation of cartridges, during a training run and after it: losses, answers, and damage to general knowledge."""
