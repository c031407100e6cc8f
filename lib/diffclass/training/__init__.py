"""How the networks in `assets/` are trained."""
