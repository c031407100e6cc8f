"""From the state of a few controls to a frame: compute with the library, describe with `figures`. No widget here."""
