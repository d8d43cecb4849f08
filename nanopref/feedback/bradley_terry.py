def davidson(winners, losers, tied, n):
    raise ValueError("not yet")
