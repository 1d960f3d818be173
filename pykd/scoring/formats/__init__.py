"""One file per kind of file that rows are read from; :mod:`pykd.scoring.sources` opens whichever it is."""
