"""Losses on the scores of candidates: how the student orders them, and by which margins, beside the teacher."""
