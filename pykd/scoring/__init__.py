"""Scoring: how far a student has drifted from its teacher, row by row, from what both have said.

``pykd score`` is the command. It needs NumPy and pyarrow; neither torch nor the exporter.
"""
