"""How it is told.

`figures`: style, caption and alternative text. `repository`: address and README. `status`: what is there and what is
missing. `reproduce`: all chapters, headlessly.
"""
