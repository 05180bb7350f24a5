"""Measurements of nanopd, run from the directory that holds this package, where nanopd can be imported.

`run` (static, poisson, trace, sweep), `handover` and `scaling` serve requests; `report` makes a page and figures of
what they wrote; `micro` measures parts alone; `studies` simulates and draws; `lib` is what all of these share;
`results` holds the reports that the documents show, and says which of them are stale. Nothing in nanopd knows of this
package.
"""
