"""`kvpool replay`: a request trace through the real manager, with every page's bytes verified.

traces     reads a trace file                         -> requests
generated  makes requests from a seed                 -> requests
prefixes   numbers block prefixes; the reuse bound    -> one key per block
pattern    what a page must hold, from its key; tokens of a block
sequential runs the requests one after the other      -> Report
report     the numbers: JSON and table
command    the command line (the only module here, with report's table, that needs click and rich)
"""
