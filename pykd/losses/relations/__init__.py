"""Losses on relations between samples: how the student arranges a batch, and how the teacher does."""
