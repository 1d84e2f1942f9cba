"""SplitMix64: a number from a number, the same on every platform. Integer arithmetic modulo 2^64 only."""

MASK64 = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """The next output of a generator in state x (Steele, Lea and Flood 2014): 64 bits, well mixed."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
