"""Models that accel knows: how their sites are found and how their layout is read."""
