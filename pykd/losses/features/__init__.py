"""Losses on hidden features of a layer: how near the student's are to the teacher's."""
