"""Who judges answers, and preferences from that."""
