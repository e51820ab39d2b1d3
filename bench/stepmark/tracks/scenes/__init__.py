"""The captioned world that several tracks stand on: the words of captions, how scenes are drawn, and the eye that reads them.

`captions` is the grammar, `drawing` the pictures and all that they show, `parser` the eye that reads scenes back, `metrics` what
is counted with it. The data are in `stepmark.datasets.scenes32` and its relatives.
"""
