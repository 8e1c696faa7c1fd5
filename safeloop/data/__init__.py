"""Data: what gives batches becomes a `Source`, its order a function of (seed, epoch); moving to the device."""
