"""The worker: attacks, local gradients, the exchange and the update of an exact replica."""
