"""Judging a trained model: accuracy under attacks that a user names, sample by sample.

requests    what to attack with, and sweeps: from text to frozen values
restarts    PGD and FGSM on one batch
autoattack  the standard suite on one batch
verdicts    what came out for each sample, counts over them, and their table
folder      what is kept on the disk, so that an evaluation can go on
processes   several devices, one process each
judge       one process that judges, and what it is told
run         one evaluation, batch by batch
evaluation  all of it together: what `datps evaluate` does
"""
