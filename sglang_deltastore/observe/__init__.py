"""What a running server knows of its store, fed by the seam's events; nothing in the store calls it.

stats     the table of facts: every field with its unit, its meaning and its series
nodes     a mirror of the radix tree on the host, kept by events
census    who owns which page: the accounting identity on sets, in slices, while nothing runs
reads     what attention reads and encodes, from lengths
drift     how far queries have moved from the calibration's: samples of extend steps
history   the last minutes; series: Prometheus; top, dashboard: what people look at
guard     nothing here may end the server
"""
