"""`kvpool replay`: a request trace through the real manager, with every page's bytes verified.

traces     reads a trace file                         -> requests
generated  makes requests from a seed                 -> requests
prefixes   numbers block prefixes; the reuse bound    -> one key per block
pattern    what a page must hold, from its key; tokens of a block
options    how to run, and the manager
sequential runs the requests one after the other      -> Report
timed      runs them at their timestamps              -> Report
  executor   the simulated engine: writes, verifies, lets time pass
  content    what it writes for a token
  model      how long a step takes
report     the numbers: JSON and table
plots      the numbers over simulated time: HTML
guards     files, memory and Ctrl-C
command    the command line (needs click and rich, as guards and report's table do)
"""
