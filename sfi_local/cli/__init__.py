"""The command line."""

import gc

gc.set_threshold(50_000)  # a start makes objects that stay: to look through them after every 700 takes a tenth of its time
