"""One file per loss. Importing :mod:`pykd` imports every file of this folder; nothing lists them."""
