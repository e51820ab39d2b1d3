"""Text to image: the words of captions, the eye that reads scenes back from pictures, and what is counted with it.

`captions` is the grammar, `parser` the eye, `metrics` what is counted. The scenes are drawn by
`stepmark.datasets.scenes32`. There is no task yet, so that this is not listed as a track.
"""
