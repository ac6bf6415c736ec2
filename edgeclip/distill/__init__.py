"""Distillation: losses, data, teachers, reinforcement, stages and the trainer."""
