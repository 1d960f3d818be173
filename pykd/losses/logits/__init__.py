"""Losses on class scores: how the student's classification agrees with the teacher's, or with the labels."""
