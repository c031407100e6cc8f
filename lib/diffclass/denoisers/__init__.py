"""E[x0 | x_sigma, class] from closed forms, from networks, and from other people's networks."""
