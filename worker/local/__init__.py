"""Several local devices as one worker: q processes that share its batch, its exchange and its optimizer.

devices     what `--devices` means
team        what a process knows of the others in a round: its part of the batch, its slice of the vectors
group       how the processes' vectors come together
processes   the worker's own process starts the others, and hears when one ends
member      what one of the others does
"""
