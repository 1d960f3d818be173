"""Losses of language models, whose classes are the tokens of a vocabulary: whole distributions, the teacher's top k, sampled tokens."""
