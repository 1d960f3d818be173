"""Losses on the self-attention of transformers: where the student's tokens look, beside the teacher's."""
