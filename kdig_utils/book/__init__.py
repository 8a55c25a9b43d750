"""How it is told.

`figures`: style, caption and alternative text. `prose`: numbers in text, checked against their source. `repository`:
address and README. `status`: what is there and what is missing. `reproduce`: all chapters, headlessly.
"""
