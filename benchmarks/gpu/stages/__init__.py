"""The stages of the check, one module each, with one function ``run(context)``."""
