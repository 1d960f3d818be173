"""Losses of dense prediction: per pixel, per channel or per box, as for segmentation and detection."""
